"""One farm for the tests of this folder, which stop and kill its processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.acceptance.farms import Live, null_catalog, running


@pytest.fixture(scope="package")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A farm whose pipeline only waits in each step, and loads at once."""
    folder = tmp_path_factory.mktemp("disturbed")
    with running(folder / "farm", "null", null_catalog(folder)) as farm:
        yield farm
