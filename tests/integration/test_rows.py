"""Rows as named tuples: a statement whose columns are not the fields is refused at once."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from sqlalchemy import text

from farm.context import Farm
from farm.store.engine import transaction
from farm.store.rows import row_of, rows_of


class Pair(NamedTuple):
    """Two columns."""

    name: str
    number: int


def test_rows_have_the_fields_of_their_type(farm: Farm) -> None:
    both = text("SELECT name, number FROM (VALUES ('a', 1), ('b', 2)) AS v (name, number)")
    none = text("SELECT 'a' AS name, 1 AS number WHERE false")
    with transaction(farm.store) as connection:
        assert rows_of(connection.execute(both), Pair) == [Pair("a", 1), Pair("b", 2)]
        assert row_of(connection.execute(both), Pair) == Pair("a", 1)
        assert row_of(connection.execute(none), Pair) is None
        assert rows_of(connection.execute(none), Pair) == []


@pytest.mark.parametrize("columns", ["1 AS number, 'a' AS name", "'a' AS name", "'a' AS n, 1 AS m"])
def test_other_columns_are_refused(farm: Farm, columns: str) -> None:
    with transaction(farm.store) as connection, pytest.raises(TypeError, match="has the fields"):
        rows_of(connection.execute(text(f"SELECT {columns}")), Pair)
