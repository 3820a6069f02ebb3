"""Storage cleaner of the janitor: deletes objects that no frame refers to any more."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from farm.context import Farm
from farm.services.control_images import image_key, images_prefix, parse_image_key
from farm.storage import (
    ArtifactName,
    export_prefix,
    exports_prefix,
    job_prefix,
    parse_key,
    tenant_prefix,
)
from farm.store import control_images, retention, tenants
from farm.store.engine import transaction

log = logging.getLogger(__name__)

PASS_SECONDS = 3600.0
"""Maximum interval between two passes over the storage, in seconds. One step reads one page."""

DELETIONS_PER_CALL = 1000
"""Maximum number of orphans, or of control images, per deletion."""

UPLOAD_SECONDS = 600.0
"""Time after which an upload that has not finished counts as failed, in seconds."""


class StorageCleaner:
    """Deletes removed objects and orphans, step by step."""

    def __init__(self, farm: Farm) -> None:
        self._farm = farm
        self._goes_on: Callable[[], bool] = lambda: True
        self._after = ""
        self._pass_due_at = 0.0

    def step(self, goes_on: Callable[[], bool] = lambda: True) -> bool:
        """Delete the objects of removed jobs, and check one page for orphans. Return False.

        Args:
            goes_on: returns False if the step is to end early.

        Raises:
            Unavailable: the storage or Postgres does not answer. The next step continues.
        """
        self._goes_on = goes_on
        with transaction(self._farm.store) as connection:
            empty = retention.empty_jobs(connection, retention.MAX_JOBS_PER_CALL)
        for tenant_id, job_id in empty:
            if self._delete_below(job_prefix(tenant_id, job_id)):
                with transaction(self._farm.store) as connection:
                    retention.forget(connection, job_id)
        self._empty_exports()
        self._delete_images()
        self._empty_tenants()
        if time.monotonic() >= self._pass_due_at:
            self._look_through_page()
        return False

    def _empty_exports(self) -> None:
        """Delete the files of removed exports, except at destinations that a client chose.

        Such a place belongs to the client. Its prefix may also cover other files, even images.
        """
        with transaction(self._farm.store) as connection:
            removed = retention.removed_exports(connection, retention.MAX_JOBS_PER_CALL)
        for export in removed:
            own = (self._farm.artifacts.bucket, export_prefix(export.tenant_id, export.id))
            if (export.bucket, export.prefix) != own or self._delete_below(own[1]):
                with transaction(self._farm.store) as connection:
                    retention.forget_export(connection, export.id)

    def _delete_below(self, prefix: str) -> bool:
        """Delete every object with this prefix. Return True if none is left."""
        artifacts = self._farm.artifacts
        while self._goes_on():
            found = artifacts.list_page(prefix=prefix).objects
            if not found:
                return True
            artifacts.delete_all([stored.key for stored in found])
        return False

    def _look_through_page(self) -> None:
        orphan_seconds = self._farm.settings.orphan_seconds
        page = self._farm.artifacts.list_page(after=self._after)
        old = [stored.key for stored in page.objects if stored.age_seconds >= orphan_seconds]
        names = [name for key in old if (name := parse_key(key))]
        with transaction(self._farm.store) as connection:
            found = filter(None, map(parse_image_key, old))
            control_images.disown(connection, found, max(orphan_seconds, UPLOAD_SECONDS))
        while (deleted := self._delete_orphans(names)) and self._goes_on():
            names = [name for name in names if name not in deleted]
        self._after = page.last or ""
        if page.last is None:
            self._pass_due_at = time.monotonic() + min(PASS_SECONDS, orphan_seconds)

    def _delete_orphans(self, names: list[ArtifactName]) -> set[ArtifactName]:
        with transaction(self._farm.store) as connection:
            places = retention.orphans(connection, names, DELETIONS_PER_CALL)
        orphans = {names[place] for place in places}
        if orphans:
            self._farm.artifacts.delete_all([name.key for name in orphans])
            log.info("Deleted %d objects that no frame refers to.", len(orphans))
        return orphans

    def _delete_images(self) -> None:
        """Delete the objects of control images that were removed."""
        with transaction(self._farm.store) as connection:
            removed = control_images.removed_images(connection, DELETIONS_PER_CALL)
        if removed:
            keys = [image_key(tenant_id, image_id) for tenant_id, image_id in removed]
            self._farm.artifacts.delete_all(keys)
            with transaction(self._farm.store) as connection:
                for tenant_id, image_id in removed:
                    control_images.forget_image(connection, tenant_id, image_id)

    def _empty_tenants(self) -> None:
        """Delete the objects of removed tenants, once their rows are gone."""
        with transaction(self._farm.store) as connection:
            settled = tenants.settled(connection)
        for tenant_id in settled:
            prefixes = tenant_prefix(tenant_id), exports_prefix(tenant_id), images_prefix(tenant_id)
            if all(self._delete_below(prefix) for prefix in prefixes):
                with transaction(self._farm.store) as connection:
                    tenants.mark_emptied(connection, tenant_id)
                log.info("Deleted all objects of the removed tenant %s.", tenant_id)
