"""One farm for the tests of this folder, which read from it and add jobs to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.acceptance.farms import LiveFarm, running


@pytest.fixture(scope="package")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFarm]:
    """Run a farm with the demo's pipeline."""
    with running(tmp_path_factory.mktemp("live"), "demo") as farm:
        yield farm
