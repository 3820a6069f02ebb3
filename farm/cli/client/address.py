"""Where the farm is, and what to tell a user when it does not answer there."""

from __future__ import annotations

import os
from pathlib import Path

import httpx

from farm.cli.demo_farm import DATA
from farm.config import ENV_FILE
from farm.errors import FarmError, InvalidRequest, Unavailable

LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class Address:
    """The API's base address.

    Raises:
        InvalidRequest: it is no http or https address.
    """

    def __init__(self, url: str) -> None:
        try:
            self._url = httpx.URL(url.rstrip("/"))
        except httpx.InvalidURL:
            self._url = httpx.URL()
        if self._url.scheme not in {"http", "https"} or not self._url.host:
            raise InvalidRequest(
                f"FARM_API_URL is {url!r}, which is no address such as http://127.0.0.1:8000.",
                param="FARM_API_URL",
            )
        self.url = str(self._url)

    @property
    def is_local(self) -> bool:
        """Whether it is an address of this machine."""
        return self._url.host in LOOPBACK

    @property
    def advice(self) -> str:
        """How to tell the commands where the farm is."""
        data = os.environ.get("FARM_DATA")
        if data and not (Path(data) / ENV_FILE).is_file():
            return (
                f"FARM_DATA is {data}, which holds no {ENV_FILE}: `farm up --data {data}` makes it."
            )
        if not data and (Path(DATA) / ENV_FILE).is_file():
            return f"There is a farm's folder here: set FARM_DATA={DATA}."
        return "Set FARM_DATA or FARM_API_URL and FARM_API_KEY."

    def covers(self, url: httpx.URL) -> bool:
        """Whether an answer from `url` is the API's own, and not the image storage's."""
        return (url.host, url.port) == (self._url.host, self._url.port)

    def unreachable(self, error: httpx.TransportError) -> FarmError:
        """The error for a server that did not answer."""
        asked = error.request.url
        if not self.covers(asked):
            return Unavailable(f"The image storage at {asked.netloc.decode()} does not answer.")
        if isinstance(error, httpx.TimeoutException):
            return Unavailable(f"The farm at {self.url} did not answer in time: {error}.")
        return Unavailable(
            f"The farm at {self.url} does not answer: is `farm up` running? {self.advice}"
        )

    def refused(self, response: httpx.Response) -> FarmError:
        """The error for an answer that is not the API's."""
        answer = f"{response.status_code} {response.reason_phrase}".strip()
        own = self.covers(response.url)
        where = self.url if own else response.url.netloc.decode()
        what = "What answers at" if own else "The image storage at"
        kind = Unavailable if response.status_code in {429, 502, 503, 504} else FarmError
        return kind(f"{what} {where} said {answer} to {response.url.path}.")
