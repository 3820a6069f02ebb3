"""Shared by the tests: servers, workers, checkpoints, command lines."""
