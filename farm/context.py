"""The context of every entry point: the settings, the catalog and the three servers."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from farm.bells import Bells
from farm.config import Settings
from farm.pipelines.catalog import Catalog, Pipeline, load_catalog
from farm.pipelines.resolve import ResolvedPipeline, resolve_pipeline
from farm.storage import Artifacts
from farm.store.engine import Store, open_store

if TYPE_CHECKING:
    from farm.tracing import Traces

log = logging.getLogger(__name__)


@dataclass
class Farm:
    """Settings, catalog and connections. Opened once, at an entry point, and passed in."""

    settings: Settings
    catalog: Catalog
    store: Store
    bells: Bells
    artifacts: Artifacts
    traces: Traces | None = None
    """Recorder of traces. None if no endpoint is set."""
    _offers: dict[str, ResolvedPipeline] = field(default_factory=dict)

    def entry(self, name: str) -> Pipeline:
        """Find a pipeline in the catalog.

        Raises:
            InvalidRequest: there is no such pipeline.
        """
        return self.catalog.entry(name)

    def resolve(self, name: str) -> ResolvedPipeline:
        """Find a pipeline with its parameters. Its checkpoint's configuration is read once.

        Raises:
            InvalidRequest: there is no such pipeline.
            CatalogError: its checkpoint cannot be read.
        """
        entry = self.entry(name)
        if name not in self._offers:
            self._offers[name] = resolve_pipeline(name, entry)
        return self._offers[name]

    def is_resolved(self, name: str) -> bool:
        """Return True if `resolve` returns at once."""
        return name in self._offers

    def close(self) -> None:
        """Close every connection."""
        self.store.dispose()
        self.bells.close()
        self.artifacts.close()
        self.close_traces()

    def close_traces(self) -> None:
        """Send the last spans; nothing more is recorded."""
        if self.traces is not None:
            self.traces.close()


def open_farm(settings: Settings) -> Farm:
    """Open the catalog and the clients of the servers. They connect when first needed."""
    return Farm(
        settings=settings,
        catalog=load_catalog(settings.pipelines),
        store=open_store(settings),
        bells=Bells(settings),
        artifacts=Artifacts(settings),
        traces=_open_traces(settings.otlp_endpoint),
    )


def _open_traces(endpoint: str) -> Traces | None:
    if not endpoint:
        return None
    try:
        from farm.tracing import Traces
    except ImportError:
        # The variable may be meant for other programs, so the farm starts anyway.
        log.warning("Traces are not sent: run pip install 'farm[traces]'.")
        return None
    return Traces(endpoint)
