"""Postgres: the only place with SQL. One function a transition, each given an open connection."""
