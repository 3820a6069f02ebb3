"""The calls of OpenAI's image API. Each is a job, and its pictures are the answer."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Path, Request, Response

from api.addresses import SignedAddresses
from api.auth import AnyKey, FarmDep
from api.errors import farm_error, is_repeatable
from api.openai import schemas
from api.openai.answers import Answers
from api.openai.delivery import Delivery
from api.openai.wishes import BadRequest, UnknownModel, Wish, in_their_words, read_wish
from api.openapi import refusals
from api.request_body import parse_json, read_body
from api.routes.jobs import GROUPED_BYTES, KEY_HEADER, client_of, with_default
from api.routes.pictures import PacedResponse
from api.streaming.streams import streams_of
from api.tenancy import OwnWriter
from farm.context import Farm
from farm.domain.states import TERMINAL
from farm.errors import FarmError, Unavailable
from farm.services import jobs as use_cases
from farm.store import unanswered
from farm.store.engine import one_statement, transaction
from farm.store.keys import Caller
from farm.store.queries import JobRow

log = logging.getLogger(__name__)

router = APIRouter(prefix="/openai/v1", tags=["openai"])

REPEATS_HEADER = "x-stainless-retry-count"
"""Times that OpenAI's clients have sent a call before."""
REPEATS = re.compile(r"[0-9]{1,3}", re.ASCII)

Ended = Callable[[bool], Awaitable[object]]
"""Called when a call has ended. True: its caller got the answer."""


class NotInTime(FarmError):
    """A job did not end while its call waited. It goes on."""

    code = "not_in_time"
    status = 504


@router.post(
    "/images/generations",
    summary="Render pictures, as OpenAI's API does",
    response_model=schemas.Images,
    responses={
        200: {
            "description": "The pictures; with stream, each as an event",
            "content": {"text/event-stream": {}},
        },
        **refusals(400, 401, 404, 409, 413, 422, 429, 500, 503, 504),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schemas.Generation.model_json_schema()}},
        }
    },
)
async def generate(
    request: Request,
    farm: FarmDep,
    caller: OwnWriter,
    body: Annotated[bytes, Depends(read_body)],
    idempotency_key: Annotated[
        str | None,
        Header(
            alias=KEY_HEADER,
            min_length=1,
            max_length=200,
            description="Your own key. A call with the same key and body gets the first one's job",
        ),
    ] = None,
    traceparent: Annotated[str | None, Header(description="Trace of the client")] = None,
    repeats: Annotated[
        str, Header(alias=REPEATS_HEADER, description="Times that the call was sent before")
    ] = "0",
) -> Response:
    """Submit a job, wait for its pictures, and return them. Parameters of the pipeline, such as
    `seed` and `steps`, are fields of the body too."""
    times = _number(repeats)
    if len(body) <= GROUPED_BYTES:
        wish = _wish(farm, body)
    else:  # other calls do not wait for it
        wish = await to_thread.run_sync(_wish, farm, body)
    if wish.form == "url" and not farm.settings.signed_url_seconds:
        raise BadRequest(
            "response_format: this farm gives no signed addresses of images. Send b64_json.",
            param="response_format",
        )
    key, ended = await _key(farm, caller, wish, idempotency_key, times)
    try:
        row = await to_thread.run_sync(
            use_cases.submit,
            farm,
            caller.tenant_id,
            with_default(wish.job, caller),
            key,
            traceparent,
        )
    except FarmError as error:
        await ended(not error.retryable)  # the job may be stored, if Postgres did not answer
        raise in_their_words(error, wish) from error
    return Delivery(await _answer(request, farm, caller, wish, row), ended)


async def _key(
    farm: Farm, caller: Caller, wish: Wish, idempotency_key: str | None, repeats: int
) -> tuple[str, Ended]:
    """Return the idempotency key of a call, and what to call at its end."""
    if idempotency_key is not None:
        return idempotency_key, _forgotten
    key = await to_thread.run_sync(_begun, farm, wish.digest(caller.key_id), repeats)

    async def ended(is_answered: bool) -> None:
        try:
            await to_thread.run_sync(_end, farm, key, repeats, is_answered)
        except Unavailable as error:  # only a repeated call would notice
            log.warning("The end of a call could not be stored: %s", error)

    return key, ended


async def _forgotten(is_answered: bool) -> None:
    """Note nothing: a call with a key can be repeated at any time."""
    del is_answered


def _wish(farm: Farm, body: bytes) -> Wish:
    return read_wish(parse_json(body), sorted(farm.catalog.pipelines))


def _number(repeats: str) -> int:
    if not REPEATS.fullmatch(repeats):
        raise BadRequest(f"{REPEATS_HEADER}: send a number below 1000.", param=REPEATS_HEADER)
    return int(repeats)


def _begun(farm: Farm, digest: bytes, repeats: int) -> str:
    with transaction(farm.store) as connection:
        return unanswered.begin(connection, digest, repeats)


def _end(farm: Farm, key: str, repeats: int, is_answered: bool) -> None:
    with one_statement(farm.store) as connection:
        if is_answered:
            unanswered.end(connection, key)
        else:
            unanswered.give_up(connection, key, repeats)


async def _answer(
    request: Request, farm: Farm, caller: Caller, wish: Wish, row: JobRow
) -> Response:
    """Return the answer to a call whose job is stored."""
    headers = {"Location": f"/v1/jobs/{row.id}"}
    if wish.ignored:
        headers["Farm-Ignored"] = ", ".join(wish.ignored)
    try:
        answer = await _pictures(request, farm, caller, wish, row.id)
    except FarmError as error:
        answer = farm_error(request, error)
        # The job is there: a caller that repeats the call without a key would get another one.
        again = error.retryable and is_repeatable(request)
        answer.headers["x-should-retry"] = "true" if again else "false"
        if not again and "Retry-After" in answer.headers:
            del answer.headers["Retry-After"]
    answer.headers.update(headers)
    answer.headers.setdefault("Cache-Control", "no-store")
    return answer


async def _pictures(
    request: Request, farm: Farm, caller: Caller, wish: Wish, job_id: uuid.UUID
) -> Response:
    state = request.app.state
    addresses: SignedAddresses = state.addresses
    signed = await to_thread.run_sync(addresses.of_request, request, limiter=state.pictures)
    answers = Answers(farm, caller, wish, signed, state.answers, state.pictures)
    client, streams = client_of(request, caller), streams_of(request)
    if wish.stream:
        previews = wish.partial_images > 0
        return await streams.of_states(client, job_id, answers.blocks, previews=previews)
    seconds = farm.settings.openai_seconds
    deadline = time.monotonic() + seconds
    job = await streams.ended_job(client, job_id, seconds)
    if job.status not in TERMINAL:
        if time.monotonic() < deadline:  # the client has gone, or the process ends
            raise Unavailable(f"This process ends. Job {job_id} goes on.")
        raise NotInTime(
            f"Job {job_id} has not ended in {seconds:g} s. It goes on: GET /v1/jobs/{job_id}. "
            "Send the call with stream, or submit a job, for long renderings."
        )
    content, place = await answers.body(job)
    response = PacedResponse(content, media_type="application/json")
    response.place = place
    return response


@router.get("/models", summary="List pipelines, as OpenAI's API lists models")
async def list_models(request: Request, farm: FarmDep, _caller: AnyKey) -> schemas.Models:
    """List the catalog's pipelines."""
    return schemas.Models(data=[_model(request, name) for name in sorted(farm.catalog.pipelines)])


@router.get(
    "/models/{name:path}",
    responses=refusals(404),
    summary="Get a pipeline, as OpenAI's API does a model",
)
async def get_model(
    request: Request, farm: FarmDep, _caller: AnyKey, name: Annotated[str, Path(max_length=200)]
) -> schemas.Model:
    """Return a pipeline of the catalog."""
    if name not in farm.catalog.pipelines:
        raise UnknownModel(f"There is no model {name!r}.", param="model")
    return _model(request, name)


def _model(request: Request, name: str) -> schemas.Model:
    return schemas.Model(id=name, created=request.app.state.catalog_read_at)
