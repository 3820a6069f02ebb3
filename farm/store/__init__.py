"""Postgres: the only package with SQL. Each transition is one function on an open connection."""
