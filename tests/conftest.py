"""Real servers, started once a session; a fresh copy of a migrated database for each test."""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import make_url
from xdist.scheduler import LoadScopeScheduling

from farm.config import Settings
from farm.context import Farm, open_farm
from farm.local import Servers, embedded_servers
from farm.store import keys, migrate
from farm.store.engine import open_store, transaction

# One core is another process's. Read when torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nothing here speaks TLS: else each client of httpx reads every root certificate, for 27 ms.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.devnull

TEMPLATE = "farm_template"
SHARING = {"live", "disturbed"}
"""The folders of tests/acceptance whose tests share one farm"""
_numbers = itertools.count(1)

# How long an example takes says how busy the machine is, and nothing of the code.
hypothesis.settings.register_profile("farm", deadline=None)
hypothesis.settings.load_profile("farm")


LONGEST = "test_parity"
"""The file that keeps one process busy longest: begun last, it would leave the others idle"""


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays: no collection need look at it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem != LONGEST)


class ByFarm(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Gives a process whole files, and whole folders whose tests share a farm."""

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
def template(servers: Servers) -> str:
    # These databases live for one test each: no crash of the machine need find them again.
    _run(servers, "ALTER SYSTEM SET fsync = off")
    _run(servers, "SELECT pg_reload_conf()")
    # Each test connects several times, and 4,096 rounds of a hash take a tenth of its time.
    _run(servers, "SET scram_iterations = 1")
    password = make_url(servers.database_url).password
    _run(servers, f"ALTER USER CURRENT_USER PASSWORD '{password}'")
    _run(servers, f"CREATE DATABASE {TEMPLATE}")
    store = open_store(Settings(database_url=_database(servers, TEMPLATE)))
    migrate.upgrade(store)
    store.dispose()
    return TEMPLATE


@pytest.fixture
def settings(servers: Servers, template: str, tmp_path: Path) -> Iterator[Settings]:
    with fresh_settings(servers, template, tmp_path) as found:
        yield found


@contextmanager
def fresh_settings(servers: Servers, template: str, folder: Path) -> Iterator[Settings]:
    """Make an empty database, and the settings of a farm on it."""
    number = next(_numbers)
    name = f"farm_test_{number}"
    _run(servers, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield Settings(
        database_url=_database(servers, name),
        redis_url=SecretStr(f"{servers.redis_url.rsplit('/', 1)[0]}/{number % 15 + 1}"),
        s3_endpoint_url=servers.s3_endpoint_url,
        s3_bucket=servers.s3_bucket,
        retry_seconds=0.0,
        touch_seconds=0.05,
        transaction_seconds=2.0,
        scratch_dir=folder / "scratch",
        cache_dir=folder / "cache",
    )
    _run(servers, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def farm(settings: Settings) -> Iterator[Farm]:
    opened = open_farm(settings)
    yield opened
    for thread in threading.enumerate():
        if thread.name == "lease-watch":
            thread.join(10)  # it may be telling its last step
    opened.close()


@pytest.fixture
def tenant(farm: Farm) -> uuid.UUID:
    with transaction(farm.store) as connection:
        return keys.ensure_tenant(connection, "default")


def _database(servers: Servers, name: str) -> SecretStr:
    url = make_url(servers.database_url).set(database=name)
    return SecretStr(url.render_as_string(hide_password=False))


def _run(servers: Servers, statement: str) -> None:
    """Run a statement, over one connection for all tests: each new one costs as much as a test."""
    connection = _kept(servers.database_url)
    if connection.closed:
        _kept.cache_clear()
        connection = _kept(servers.database_url)
    connection.execute(statement.encode())


@cache
def _kept(url: str) -> psycopg.Connection[Any]:
    connection = psycopg.connect(url, autocommit=True)
    atexit.register(connection.close)
    return connection
