"""The store against a model: any order of moves, by several workers, zombies among them.

Hypothesis chooses the moves. People submit, pause, resume, cancel and retry. Workers claim and use
every lease that they ever had, even long after its loss. Leases lapse and are swept. After each
move the whole database must equal the model. The store may choose the frames of a claim; the test
only checks that the choice is legal.

`MODEL_EXAMPLES=5000 python -m pytest tests/integration/test_model.py` runs longer, with other moves
each time. The model and the moves are in `tests/integration/model/`.
"""

from __future__ import annotations

import os
import time
from datetime import date
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import invariant, run_state_machine_as_test
from sqlalchemy import event

from farm.context import Farm
from tests.integration.model.checks import check_database
from tests.integration.model.workers import WorkersMoves
from tests.support.store import new_tenant

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "50"))


class StoreMachine(WorkersMoves):
    """All moves, with a comparison of database and model after each."""

    @invariant()
    def the_database_is_the_model(self) -> None:
        check_database(self.farm, self.model)


def refuse_times(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
    """Fail if a statement has a time as parameter: leases use only Postgres's clock."""
    many = parameters if isinstance(parameters, list) else [parameters]
    for value in (value for values in many for value in dict(values or {}).values()):
        recent = abs(value - time.time()) < 86_400 if isinstance(value, int | float) else False
        assert not recent, f"a time was sent with {statement}"
        assert not isinstance(value, date), f"a time was sent with {statement}"


@pytest.mark.full_size
@pytest.mark.timeout(600 + 5 * EXAMPLES)
def test_the_store_does_what_the_model_does(farm: Farm) -> None:
    tenants = [new_tenant(farm, name) for name in ("ann", "bob")]
    event.listen(farm.store, "before_cursor_execute", refuse_times)

    class Machine(StoreMachine):
        def __init__(self) -> None:
            super().__init__(farm, tenants)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=50,
            derandomize="MODEL_EXAMPLES" not in os.environ,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
