"""A worker's render loop in the test's own process, on a pipeline that it loads."""

from __future__ import annotations

import uuid

from farm.context import Farm
from farm.rendering.warmup import warm_up
from farm.store import workers
from farm.store.engine import transaction
from workers.render.assembly import Assembly, assemble
from workers.render.identity import Identity


def assembly_of(farm: Farm, pipeline: str) -> Assembly:
    """Register a worker, load its pipeline and warm it up, as a child does before its first bell.

    `loop.run()` then renders until the lane is empty. The caller closes the loop.
    """
    identity = Identity(uuid.uuid4(), pipeline, "here", 1)
    with transaction(farm.store) as connection:
        workers.register(
            connection, identity.id, name=identity.name, pipeline=pipeline, host="here", pid=1
        )
    resolved = farm.resolve(pipeline)
    loaded = resolved.family.load(resolved.pipeline)
    return assemble(farm, identity, resolved, loaded, warm_up(resolved, loaded))
