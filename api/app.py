"""The HTTP API and the dashboard: `farm api` serves it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial
from typing import Any

from anyio import CapacityLimiter, Semaphore, to_thread
from fastapi import APIRouter, FastAPI
from fastapi.staticfiles import StaticFiles
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from api import auth, errors, openapi, refused
from api.addresses import SignedAddresses
from api.dashboard import (
    api_docs,
    buttons,
    changes_page,
    copies,
    failures_page,
    gallery_page,
    job_pages,
    jobs_page,
    lanes_page,
    operations_page,
    pictures,
    session,
    system_page,
    usage_page,
)
from api.dashboard.html import STATIC
from api.dashboard.shared import SharedAnswers
from api.door import FrontDoor
from api.heads import Heads
from api.openai import answers as openai_answers
from api.openai import images as openai_images
from api.places import Places, Turns
from api.recent_readiness import RecentReadiness
from api.request_rates import RequestRates
from api.routes import (
    destinations,
    events,
    exports,
    faults,
    frames,
    health,
    images,
    inputs,
    jobs,
    lanes,
    operations,
    overview,
    pipelines,
    steering,
    tenants,
    usage,
    webhooks,
    workers,
)
from api.routes import (
    pictures as signed_pictures,
)
from api.streaming.streams import Streams
from api.waiting_reasons import RecentLanes
from farm.config import Settings, load_settings
from farm.context import open_farm
from farm.process import version

THREADS = 8
"""Number of threads for calls. Each call waits often for Postgres, and then for the interpreter.

More threads make every response later, and give fewer responses per second.
"""


STORAGE_THREADS, HEALTH_THREADS, SLOW_THREADS, BATCH_THREADS, RATING_THREADS = 8, 2, 2, 4, 2
PICTURE_THREADS = 8
"""Number of separate threads for six kinds of calls. The threads above never wait for these.

Storage: pictures of the dashboard. Health: readiness, which asks every server. Slow: long calls,
such as whole inputs and many frames at once. Batch: many jobs in one call. Rating: Redis is asked
whether a tenant with a limit of requests may send one. Picture: images by their signed addresses.
"""
BATCHES_PER_TENANT = 2
"""Batches of a tenant that are handled at a time: one may be checked while one is stored."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the app.

    Args:
        settings: Settings of the farm. Default: from the environment.
    """
    chosen = settings or load_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.farm = open_farm(chosen)
        app.state.catalog_read_at = int(time.time())
        app.state.recent = RecentLanes(app.state.farm.store)
        app.state.submissions = jobs.submissions(app.state.farm, app.state.recent)
        app.state.rates = RequestRates(chosen)
        app.state.rating = CapacityLimiter(RATING_THREADS)
        app.state.callers = auth.Callers(app.state.farm)
        app.state.addresses = SignedAddresses(app.state.farm)
        app.state.streams = Streams(app.state.farm, app.state.addresses)
        to_thread.current_default_thread_limiter().total_tokens = THREADS
        app.state.intakes = Places(inputs.MAX_CONCURRENT_UPLOADS, inputs.MAX_UPLOADS_PER_TENANT)
        app.state.decoding = CapacityLimiter(images.MAX_CONCURRENT_DECODINGS)
        crowd = images.MAX_CONCURRENT_DECODINGS + images.MAX_WAITING
        app.state.admitted = Places(2 * crowd, crowd)
        app.state.storage = CapacityLimiter(STORAGE_THREADS)
        app.state.pictures = CapacityLimiter(PICTURE_THREADS)
        app.state.making = Semaphore(pictures.MAKING_THREADS)
        app.state.made = Places(pictures.MAX_MADE, pictures.MADE_PER_TENANT)
        app.state.sent = Places(signed_pictures.MAX_SENT, signed_pictures.MAX_SENT)
        app.state.answers = Places(openai_answers.MIB_AT_ONCE, openai_answers.MIB_PER_TENANT)
        app.state.webhook_tests = Places(webhooks.TESTS, webhooks.TESTS_PER_TENANT)
        app.state.health = CapacityLimiter(HEALTH_THREADS)
        app.state.shared = SharedAnswers()
        app.state.checks = system_page.Checks(app.state.farm)
        app.state.slow = Turns(SLOW_THREADS)
        app.state.readiness = RecentReadiness(partial(health.readiness, app.state.farm))
        app.state.batches = Turns(BATCH_THREADS, BATCHES_PER_TENANT)
        yield
        app.state.readiness.close()
        app.state.streams.feed.close()
        app.state.streams.feed.previews.close()
        app.state.farm.close()

    app = Api(
        title="The farm",
        summary="A distributed render farm for text-to-image diffusion",
        version=version(),
        lifespan=lifespan,
        # FastAPI's own pages load scripts from another site; api.dashboard.api_docs does not.
        docs_url=None,
        redoc_url=None,
        webhooks=webhooks.messages,
    )
    app.add_middleware(Heads)
    app.add_middleware(FrontDoor)
    app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=chosen.trusted_proxies)
    errors.install(app)
    refused.install(app)
    app.router.routes.extend(_routes().routes)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


@cache
def _routes() -> APIRouter:
    """Return the routes of every app. FastAPI prepares each at its first call, for 0.1 s in all."""
    router = APIRouter()
    job_calls = openapi.refusals(401, 403, 422, 429, 503)
    router.include_router(jobs.router, responses=job_calls)
    router.include_router(steering.router, responses=job_calls)
    router.include_router(frames.router, responses=job_calls)
    router.include_router(events.router, responses=job_calls)
    router.include_router(signed_pictures.router)
    router.include_router(images.router, responses=job_calls)
    router.include_router(inputs.router, responses=job_calls)
    router.include_router(exports.router, responses=job_calls)
    router.include_router(pipelines.router, responses=openapi.refusals(401, 429, 503))
    router.include_router(workers.router, responses=openapi.refusals(401, 429, 503))
    router.include_router(destinations.router, responses=job_calls)
    router.include_router(webhooks.router, responses=job_calls)
    router.include_router(tenants.router, responses=job_calls)
    router.include_router(tenants.of_keys, responses=job_calls)
    router.include_router(usage.router, responses=job_calls)
    router.include_router(lanes.router, responses=job_calls)
    router.include_router(operations.router, responses=job_calls)
    router.include_router(overview.router, responses=job_calls)
    router.include_router(faults.router, responses=job_calls)
    router.include_router(openai_images.router, responses=job_calls)
    router.include_router(health.router)
    for pages in (
        api_docs,
        jobs_page,
        system_page,
        operations_page,
        lanes_page,
        failures_page,
        copies,
        buttons,
        job_pages,
        gallery_page,
        pictures,
        usage_page,
        changes_page,
        session,
    ):
        router.include_router(pages.router)
    return router


class Api(FastAPI):
    """FastAPI with the OpenAPI document of api.openapi."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, which describes every call."""
        if not self.openapi_schema:
            self.openapi_schema = openapi.describe(self)
        return self.openapi_schema
