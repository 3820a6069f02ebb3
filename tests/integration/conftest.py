"""A pipeline whose every step a test can disturb, and the render line of a worker on it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from farm.catalog import Pipeline
from farm.context import Farm
from farm.offers import Offer
from farm.store import workers
from farm.store.engine import transaction
from tests.noise import Noise, NoiseParams
from workers.identity import Identity
from workers.line import RenderLine


@pytest.fixture
def noise(farm: Farm) -> Noise:
    family = Noise()
    pipeline = Pipeline(source="nowhere", bucket={"default": 4})
    farm.catalog.pipelines["noise"] = pipeline
    farm._offers["noise"] = Offer("noise", pipeline, family, NoiseParams, NoiseParams)
    return family


@pytest.fixture
def line(farm: Farm, noise: Noise) -> Iterator[RenderLine]:
    identity = Identity(uuid.uuid4(), "noise", "here", 1)
    with transaction(farm.store) as connection:
        workers.register(
            connection, identity.id, name=identity.name, pipeline="noise", host="here", pid=1
        )
    offer = farm.offer("noise")
    line = RenderLine(farm, identity, offer, offer.family.load(offer.pipeline))
    yield line
    line.close()
