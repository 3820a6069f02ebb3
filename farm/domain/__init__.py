"""Specs, states and invariants: pure, without a server or a library of models."""
