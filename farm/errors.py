"""Errors that users may see. Each names the place, the problem, and whether a retry can help."""

from __future__ import annotations

import math
from dataclasses import dataclass


def one_line(said: object, limit: int = 300) -> str:
    """Put a library's message, often several lines, on one line of at most `limit` characters."""
    line = " ".join(str(said).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


@dataclass(frozen=True)
class Limit:
    """A limit of a tenant that a call met."""

    name: str
    value: float
    used: float
    """Number that the tenant has now."""
    fits_later: bool
    """False if the call asks for more than the limit itself."""
    wait_seconds: int | None = None
    """Time after which the call succeeds, in seconds. None: not known."""
    burst: int | None = None
    """Of requests a second: number of requests that may arrive at once."""


class FarmError(Exception):
    """Base of every error the farm raises on purpose; its message is written for the user."""

    code = "internal_error"
    status = 500
    retryable = False
    request_id: str | None = None
    """In a client: ID of the call in the logs of the API."""
    idempotency_key: str | None = None
    """In a client: key of the submission that failed. With it, the same job can be sent again."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(FarmError):
    """A value is outside what the field allows; `param` names the field."""

    code = "invalid_request"
    status = 422


class MalformedBody(FarmError):
    """The request's body is not JSON, or contains text that cannot be stored."""

    code = "malformed_body"
    status = 400


class TooLarge(FarmError):
    """The request's body is larger than FARM_MAX_BODY_BYTES, or FARM_MAX_IMAGE_BYTES."""

    code = "body_too_large"
    status = 413


class TooSlow(FarmError):
    """The request's body did not arrive in time; other requests may need its place."""

    code = "body_too_slow"
    status = 408


class UnsupportedMediaType(FarmError):
    """The call does not accept this type of request body."""

    code = "unsupported_media_type"
    status = 415


class Unauthenticated(FarmError):
    """The API key is missing, unknown or revoked."""

    code = "unauthenticated"
    status = 401


class Forbidden(FarmError):
    """The key's role does not allow this call, or the tenant may not use this value."""

    code = "forbidden"
    status = 403


class NotFound(FarmError):
    """The object does not exist, or it belongs to another tenant."""

    code = "not_found"
    status = 404


class Conflict(FarmError):
    """The call contradicts what is already stored."""

    code = "conflict"
    status = 409


class KeyReused(FarmError):
    """An idempotency key was used with another body before."""

    code = "idempotency_mismatch"
    status = 422


class LimitExceeded(FarmError):
    """A tenant would have more than its operator allows. The same call may succeed later."""

    code = "limit_exceeded"
    status = 429
    limit: Limit | None = None
    """None in a program that only read the answer of an API."""

    @classmethod
    def of(cls, name: str, value: int, *, used: int, more: int) -> LimitExceeded:
        """Build it for a call that would add `more` to what a tenant has."""
        limit = Limit(name, value, used, fits_later=more <= value)
        things = name.removeprefix("max_").replace("_", " ")
        hint = (
            "Try again when others have ended."
            if limit.fits_later
            else "That is more than the limit itself: make it smaller."
        )
        error = cls(
            f"{name}: this tenant may have {value:,} {things}. It has {used:,}, and this would add "
            f"{more:,}. {hint}"
        )
        error.limit = limit
        return error

    @classmethod
    def of_seconds(
        cls, value: float, *, used: float, promised: float, more: float, month_in: float
    ) -> LimitExceeded:
        """Build it for work that would need `more` device seconds.

        `month_in` is the time until the next month begins, in seconds.
        """
        fits, wait = more <= value, None
        if not fits:
            hint = "That is more than the limit itself: make it smaller."
        elif used < value and used + more <= value:
            hint = "Try again when other jobs have ended."
        else:
            hint, wait = (
                f"The next month begins in {month_in / 86_400:,.1f} days.",
                math.ceil(month_in),
            )
        error = cls(
            f"device_seconds_a_month: this tenant may use {value:,.1f} s of device time a month. "
            f"It has used {used:,.1f} s, its waiting and running frames need about "
            f"{promised:,.1f} s, and this would need about {more:,.1f} s. {hint}"
        )
        error.limit = Limit(
            "device_seconds_a_month",
            value,
            used + promised,
            fits_later=fits,
            wait_seconds=wait,
        )
        return error

    @classmethod
    def of_requests(cls, per_second: float, burst: int, wait: float) -> LimitExceeded:
        """Build it for a request that came too soon, by `wait` seconds."""
        error = cls(
            f"requests_a_second: this tenant may send {per_second:,.2f} requests a second, and "
            f"{burst:,} at once. Try again after {wait:.2f} s."
        )
        error.limit = Limit(
            "requests_a_second",
            per_second,
            per_second,
            fits_later=True,
            wait_seconds=math.ceil(wait),
            burst=burst,
        )
        return error


class Unavailable(FarmError):
    """A server that the farm needs does not answer. The same call may succeed soon."""

    code = "unavailable"
    status = 503
    retryable = True
    is_undecided = False
    """True if the call may have been carried out, though its end is not known."""


class StorageRefused(FarmError):
    """The storage answers with a refusal: the clock or credentials of this process are wrong."""

    code = "storage_refused"
    status = 503
    retryable = True


class CatalogError(FarmError):
    """pipelines.toml or a checkpoint in it cannot be used. The message says what to do."""

    code = "catalog_error"
    status = 500


class OutOfMemory(CatalogError):
    """A pipeline does not fit in the memory that is free now."""

    code = "out_of_memory"
    retryable = True


class RenderError(FarmError):
    """A frame cannot be rendered, and a retry would not help."""

    code = "render_error"
    status = 500


class NotFinite(RenderError):
    """The values of an image overflowed. It would be stored as a black image."""

    code = "not_finite"
