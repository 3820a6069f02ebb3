"""Building a render loop with its collaborators."""

from __future__ import annotations

import os
from dataclasses import dataclass

from farm.context import Farm
from farm.imaging.encoding import Encoder
from farm.imaging.filters import load_filters
from farm.pipelines.batch_plans import batch_plans, plans_for_a_second_batch
from farm.pipelines.family import LoadedPipeline
from farm.pipelines.resolve import ResolvedPipeline
from farm.pipelines.runtime.devices import usable_memory
from farm.pipelines.runtime.slots import SlotTest
from farm.rendering.environment import environment_of
from farm.rendering.warmup import CompiledShapes, default_shape
from farm.services.previews import Previews
from workers.render.batch import ImageWriter
from workers.render.batch_log import BatchLog
from workers.render.claims import Claims
from workers.render.committing import BatchCommitter
from workers.render.filtering import FilterChain
from workers.render.finishing import BatchFinisher
from workers.render.identity import Identity
from workers.render.interactive import InteractiveClaims
from workers.render.loop import RenderLoop
from workers.render.previews.batches import Previewing, keeps_pictures_back
from workers.render.previews.colours import colours_of
from workers.render.reuse import Reuse
from workers.render.scratch import Scratch
from workers.render.spool import Spool, SpoolDrain


@dataclass(frozen=True)
class Assembly:
    """A render loop and the parts that it was built from."""

    loop: RenderLoop
    identity: Identity
    resolved: ResolvedPipeline
    loaded: LoadedPipeline
    claims: Claims
    interactive: InteractiveClaims
    encoder: Encoder
    spool: Spool
    drain: SpoolDrain
    committer: BatchCommitter
    finisher: BatchFinisher


def assemble(
    farm: Farm,
    identity: Identity,
    resolved: ResolvedPipeline,
    loaded: LoadedPipeline,
    compiled_shapes: CompiledShapes | None = None,
    slots: SlotTest | None = None,
    batch_log: BatchLog | None = None,
) -> Assembly:
    """Build the render loop of one child.

    Args:
        farm: the opened farm.
        identity: the worker.
        resolved: the pipeline that the worker serves.
        loaded: the pipeline on the device.
        compiled_shapes: shapes compiled by the warm-up. Default: none.
        slots: the slot test, with the shapes that it knows. Default: a new one.
        batch_log: the log of the batch on the device. Default: none.
    """
    environment = environment_of(loaded)
    slots = slots or SlotTest(resolved.name, resolved.family, resolved.params_type)
    encoder = Encoder(environment, lambda frame: slots.threads_of(frame, environment.threads))
    scratch = Scratch(farm.settings.scratch_dir, identity.id)
    entry, too_large = resolved.pipeline, scratch.too_large()
    default = default_shape(resolved)
    claims = Claims(farm, identity, batch_plans(entry, too_large))
    second = plans_for_a_second_batch(
        entry, f"{default.width}x{default.height}", usable_memory(loaded.device), too_large
    )
    interactive = InteractiveClaims(farm, identity, claims, second)
    filters = FilterChain(farm, identity, load_filters(resolved.pipeline.filters))
    reuse = Reuse(farm, identity, encoder)
    writer = ImageWriter(farm, identity)
    committer = BatchCommitter(farm, identity)
    spool = Spool(scratch.pictures(os.getpid()), farm.settings.spool_bytes)
    drain = SpoolDrain(farm.store, identity, spool, writer, committer, claims)
    finisher = BatchFinisher(
        identity, encoder, filters, reuse, writer, spool, drain, committer, claims
    )
    # A filter or a safety checker may keep a picture back: then nobody must see it before.
    shows = not entry.filters and not keeps_pictures_back(loaded)
    previewing = Previewing(Previews(farm.settings), colours_of(loaded) if shows else None)
    loop = RenderLoop(
        farm,
        identity,
        resolved,
        loaded,
        claims=claims,
        interactive=interactive,
        finisher=finisher,
        reuse=reuse,
        slots=slots,
        scratch=scratch,
        previewing=previewing,
        compiled_shapes=compiled_shapes or CompiledShapes(),
        batch_log=batch_log,
    )
    return Assembly(
        loop=loop,
        identity=identity,
        resolved=resolved,
        loaded=loaded,
        claims=claims,
        interactive=interactive,
        encoder=encoder,
        spool=spool,
        drain=drain,
        committer=committer,
        finisher=finisher,
    )
