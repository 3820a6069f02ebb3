"""The HTTP client of the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient


def farm_client() -> FarmClient:
    """Open a client of the farm that the settings name; its modules are imported when needed."""
    from farm.cli.client.http import FarmClient
    from farm.config import load_settings

    return FarmClient.of(load_settings())
