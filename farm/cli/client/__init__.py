"""The HTTP client of the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient


def farm_client() -> FarmClient:
    """Open a client for the farm in the settings. Heavy modules are imported only here."""
    from farm.cli.client.http import FarmClient
    from farm.config import load_settings

    return FarmClient.of(load_settings())
