"""Alembic's environment: it runs on the connection that farm.store.migrate passes in."""

from __future__ import annotations

from alembic import context

from farm.store.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, compare_server_default=True)
with context.begin_transaction():
    context.run_migrations()
