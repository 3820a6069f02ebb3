"""A product backend: takes an order, hears from the farm when it is done, and shows the pictures.

Start the farm with FARM_WEBHOOK_NETWORKS=127.0.0.0/8, since this backend runs on the same machine.
Run: uvicorn --app-dir examples backend:app --port 8080
Then: curl -sS http://127.0.0.1:8080/orders/1001 -d "a red star on a blue background"
And open http://127.0.0.1:8080/orders/1001
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import escape

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse

from farm.client import AsyncFarm, FarmError, InvalidSignature, verify_webhook

PIPELINE = os.environ.get("FARM_EXAMPLE_PIPELINE", "demo")
OWN_URL = os.environ.get("BACKEND_URL", "http://127.0.0.1:8080")
"""Address at which the farm reaches this backend."""

finished: dict[str, list[str]] = {}
"""Addresses of the pictures of each finished order. A real backend has a database."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the client of the farm, and read the secret that signs its messages."""
    async with AsyncFarm() as farm:  # FARM_API_URL, FARM_API_KEY
        app.state.farm, app.state.secret = farm, await farm.webhook_secret()
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/orders/{order}", status_code=202)
async def take(order: str, request: Request) -> dict[str, str]:
    """Submit the job of an order. Taken again, it is the first job."""
    try:
        job = await app.state.farm.submit(
            PIPELINE,
            (await request.body()).decode(),
            idempotency_key=f"order-{order}",
            images_per_prompt=2,
            finish_by=3600,
            metadata="none",  # customers get the files
            labels={"order": order},
            webhook={"url": f"{OWN_URL}/hooks/farm"},
        )
    except FarmError as error:  # it names the field and what to do
        raise HTTPException(error.status, error.message) from error
    return {"order": order, "job": job.id}


@app.post("/hooks/farm")
async def hear(request: Request) -> Response:
    """Note the end of a job. A message may come twice, which changes nothing."""
    try:
        message = verify_webhook(await request.body(), request.headers, app.state.secret)
    except InvalidSignature:
        return Response(status_code=401)
    job = await app.state.farm.job(message["data"]["id"])
    finished[job.labels["order"]] = [image.signed_url async for image in job.images()]
    return Response(status_code=204)


@app.get("/orders/{order}")
async def show(order: str) -> HTMLResponse:
    """Show the pictures of an order, or that it is being rendered."""
    if order not in finished:
        return HTMLResponse("<p>Your pictures are being rendered.</p>", 202)
    pictures = [f'<img src="{escape(url)}" alt="picture">' for url in finished[order]]
    return HTMLResponse("".join(pictures) or "<p>Your pictures could not be rendered.</p>")
