"""Specs, states and invariants: pure code that needs no server and no model library."""
