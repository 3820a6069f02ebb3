"""Databases for tests. A copy has 336 files and costs more than most tests, so copies are reused.

A reused copy is emptied first. It is dropped if a test changed more than rows or left many rows.
"""

from __future__ import annotations

import atexit
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import psycopg
from sqlalchemy import make_url

from farm.config import Settings
from farm.store import migrate
from farm.store.engine import open_store

TEMPLATE = "farm_template"
_numbers = itertools.count(1)

# Rows of a fresh copy, in the tables that migrations fill.
KEEP_ROWS = """
DO $$ DECLARE name text; filled boolean; BEGIN
  CREATE SCHEMA kept;
  FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' LOOP
    EXECUTE format('SELECT EXISTS (SELECT FROM public.%I)', name) INTO filled;
    IF filled THEN EXECUTE format('CREATE TABLE kept.%1$I AS TABLE public.%1$I', name); END IF;
  END LOOP;
END $$
"""
LEAVE = """
SELECT bool_and(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""
# A change of a table or a function writes a row into one of these, and so does ANALYZE.
SHAPE = """
WITH ours AS (SELECT oid, xmin FROM pg_class WHERE relnamespace = 'public'::regnamespace),
written AS (
  SELECT xmin FROM ours
  UNION ALL SELECT xmin FROM pg_attribute WHERE attrelid IN (SELECT oid FROM ours)
  UNION ALL SELECT xmin FROM pg_constraint WHERE connamespace = 'public'::regnamespace
  UNION ALL SELECT xmin FROM pg_trigger WHERE tgrelid IN (SELECT oid FROM ours)
  UNION ALL SELECT xmin FROM pg_proc WHERE pronamespace = 'public'::regnamespace
)
SELECT count(*), max(xmin::text::bigint),
  (SELECT count(*) FROM pg_statistic WHERE starelid IN (SELECT oid FROM ours)),
  pg_database_size(current_database()) >> 23,
  EXISTS (SELECT FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase
    WHERE d.datname = current_database())
FROM written
"""
EMPTY = """
SET session_replication_role = replica;
DO $$ DECLARE name text; BEGIN
  FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' LOOP
    EXECUTE format('DELETE FROM public.%I', name);
  END LOOP;
  FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'kept' LOOP
    EXECUTE format('INSERT INTO public.%1$I TABLE kept.%1$I', name);
  END LOOP;
  PERFORM setval(seqrelid, seqstart, false) FROM pg_sequence;
END $$;
SELECT pg_stat_reset()
"""


class Databases:
    """The databases of one Postgres server. Not thread-safe."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self._free: list[str] = []
        self._shape: tuple[Any, ...] | None = None

    def url(self, name: str) -> str:
        return self._url.set(database=name).render_as_string(hide_password=False)

    def prepare(self) -> None:
        """Create the template, on a server that nothing else uses."""
        # These databases live for one test each, so they need not survive a crash of the machine.
        self.run("ALTER SYSTEM SET fsync = off")
        self.run("ALTER SYSTEM SET wal_init_zero = off")
        self.run("SELECT pg_reload_conf()")
        # Each test connects several times; 4,096 rounds of a hash would take a tenth of its time.
        self.run("SET scram_iterations = 1")
        self.run(f"ALTER USER CURRENT_USER PASSWORD '{self._url.password}'")
        self.run(f"CREATE DATABASE {TEMPLATE}")
        store = open_store(Settings(database_url=self.url(TEMPLATE)))
        migrate.upgrade(store)
        store.dispose()
        with self._connected(TEMPLATE) as connection:
            connection.execute("TRUNCATE actions RESTART IDENTITY")  # those of the migration
            connection.execute(KEEP_ROWS)
            self._shape = connection.execute(SHAPE).fetchone()

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """Lend a database in the state of the template. Yield its name."""
        name = self._free.pop() if self._free else self._copy(TEMPLATE)
        yield name
        if self._emptied(name):
            self._free.append(name)
        else:
            self._drop(name)

    @contextmanager
    def copy(self, of: str = TEMPLATE) -> Iterator[str]:
        """Lend a new copy of a database that has no connections, for one test. Yield its name."""
        name = self._copy(of)
        yield name
        self._drop(name)

    def run(self, statement: str) -> None:
        """Run a statement on a shared connection: opening a new one costs as much as a test."""
        connection = _kept(self._url.render_as_string(hide_password=False))
        if connection.closed:
            _kept.cache_clear()
            connection = _kept(self._url.render_as_string(hide_password=False))
        connection.execute(statement.encode())

    def _copy(self, of: str) -> str:
        name = f"farm_test_{next(_numbers)}"
        self.run(f"CREATE DATABASE {name} TEMPLATE {of}")
        return name

    def _drop(self, name: str) -> None:
        self.run(f"DROP DATABASE {name} WITH (FORCE)")

    def _emptied(self, name: str) -> bool:
        """Reset a database to a fresh one's rows. Return False if more than rows was changed."""
        with self._connected(name) as connection:
            connection.execute(LEAVE)
            if connection.execute(SHAPE).fetchone() != self._shape:
                return False
            connection.execute(EMPTY)
        return True

    def _connected(self, name: str) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url(name), autocommit=True)


@cache
def _kept(url: str) -> psycopg.Connection[Any]:
    connection = psycopg.connect(url, autocommit=True)
    atexit.register(connection.close)
    return connection
