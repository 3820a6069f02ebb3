"""The farm's address, and the error messages for a farm that does not answer."""

from __future__ import annotations

import os
from pathlib import Path

import httpx

from farm.client import DATA
from farm.config import ENV_FILE
from farm.errors import FarmError, InvalidRequest, Unavailable

LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class Address:
    """The base URL of the API.

    Raises:
        InvalidRequest: it is not an http or https URL.
    """

    def __init__(self, url: str) -> None:
        try:
            self._url = httpx.URL(url.rstrip("/"))
        except httpx.InvalidURL:
            self._url = httpx.URL()
        if self._url.scheme not in {"http", "https"} or not self._url.host:
            raise InvalidRequest(
                f"FARM_API_URL: {url!r} is not a valid URL. Example: http://127.0.0.1:8000.",
                param="FARM_API_URL",
            )
        self.url = str(self._url)

    @property
    def is_local(self) -> bool:
        """Return True if the address belongs to this machine."""
        return self._url.host in LOOPBACK

    @property
    def advice(self) -> str:
        """Return a sentence that explains how to set the farm's address."""
        data = os.environ.get("FARM_DATA")
        if data and not (Path(data) / ENV_FILE).is_file():
            return (
                f"FARM_DATA is {data}, which has no file {ENV_FILE}. `farm up --data {data}` "
                "creates it."
            )
        if not data and (Path(DATA) / ENV_FILE).is_file():
            return f"This folder contains a farm: set FARM_DATA={DATA}."
        return "Set FARM_DATA, or FARM_API_URL and FARM_API_KEY."

    def covers(self, url: httpx.URL) -> bool:
        """Return True if `url` belongs to the API, and False if to the image storage."""
        is_as_safe = url.scheme in ("https", self._url.scheme)
        return is_as_safe and (url.host, url.port) == (self._url.host, self._url.port)

    def unreachable(self, error: httpx.TransportError) -> FarmError:
        """Return the error for a server that did not answer."""
        try:
            asked = error.request.url
        except RuntimeError:  # it is about an answer
            return Unavailable(f"The farm at {self.url} sends no events: {error}.")
        if not self.covers(asked):
            return Unavailable(f"The image storage at {asked.netloc.decode()} does not answer.")
        if isinstance(error, httpx.TimeoutException):
            return Unavailable(f"The farm at {self.url} did not answer in time: {error}.")
        return Unavailable(
            f"The farm at {self.url} does not answer. Is `farm up` running? {self.advice}"
        )

    def refused(self, response: httpx.Response) -> FarmError:
        """Return the error for an answer that does not come from the API."""
        answer = f"{response.status_code} {response.reason_phrase}".strip()
        own = self.covers(response.url)
        where = self.url if own else response.url.netloc.decode()
        what = "The server at" if own else "The image storage at"
        kind = Unavailable if response.status_code in {429, 502, 503, 504} else FarmError
        return kind(f"{what} {where} answered {answer} to {response.url.path}.")
