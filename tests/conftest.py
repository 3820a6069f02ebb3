"""Real servers, started once per session. A fresh copy of a migrated database for each test."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from pydantic import SecretStr
from xdist.scheduler import LoadScopeScheduling

from farm.config import Settings
from farm.context import Farm, open_farm
from farm.local import Servers, embedded_servers
from farm.process import collect_rarely
from farm.store import keys
from farm.store.engine import transaction
from tests.support.databases import Databases

# One core is left to other processes. Read on import of torch; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests use no TLS. Without this, each client of httpx reads all root certificates in 27 ms.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.devnull

SHARING = {"live", "disturbed"}
"""Folders of tests/acceptance whose tests share one farm."""
_numbers = itertools.count(1)

# An example's duration depends on the machine's load more than on the code.
hypothesis.settings.register_profile("farm", deadline=None)
hypothesis.settings.load_profile("farm")


LONGEST = "test_parity"
"""The slowest file. It begins first; begun last, it would leave the other processes idle."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import all test files, then start to collect garbage: what was imported stays."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()
    collect_rarely()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem != LONGEST)


class ByFarm(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """A scheduler that assigns whole files, and whole folders whose tests share a farm."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.partition("::")[0])
        return str(file if file.parent.name not in SHARING else file.parent)


@pytest.hookimpl
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFarm:
    return ByFarm(config, log)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with embedded_servers(tmp_path_factory.mktemp("servers")) as running:
        os.environ.update(
            {name: value for name, value in running.env.items() if name.startswith("AWS_")}
        )
        yield running


@pytest.fixture(scope="session")
def databases(servers: Servers) -> Databases:
    made = Databases(servers.database_url)
    made.prepare()
    return made


@pytest.fixture
def settings(servers: Servers, databases: Databases, tmp_path: Path) -> Iterator[Settings]:
    with databases.fresh() as name:
        yield settings_on(servers, databases.url(name), tmp_path)


def settings_on(servers: Servers, database_url: str, folder: Path) -> Settings:
    """Return the settings of a farm on this database, with its own Redis database number."""
    return Settings(
        database_url=SecretStr(database_url),
        redis_url=SecretStr(f"{servers.redis_url.rsplit('/', 1)[0]}/{next(_numbers) % 15 + 1}"),
        s3_endpoint_url=servers.s3_endpoint_url,
        s3_bucket=servers.s3_bucket,
        retry_seconds=0.0,
        progress_seconds=0.05,
        transaction_seconds=2.0,
        key_seconds=0.0,  # tests revoke keys and look at once
        scratch_dir=folder / "scratch",
        cache_dir=folder / "cache",
    )


@pytest.fixture
def farm(settings: Settings) -> Iterator[Farm]:
    opened = open_farm(settings)
    yield opened
    for thread in threading.enumerate():
        if thread.name == "lease-watch":
            thread.join(10)  # it may still report its last step
    opened.close()


@pytest.fixture
def tenant(farm: Farm) -> uuid.UUID:
    with transaction(farm.store) as connection:
        return keys.ensure_tenant(connection, "default")
