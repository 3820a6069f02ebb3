"""Receivers of webhooks that behave badly, and the check of what they got."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from random import Random

import httpx

from tests.chaos.scene import ChaosRun
from tests.support.receiver import CUT, Receiver, Request, receiving
from tests.support.waiting import wait_until

KINDS = ["job.*", "frames.succeeded"]
SETTLE_SECONDS = 600.0
HANGING_SECONDS = 11.0
"""Longer than an attempt may take."""
GONE = "gone"

LAST = "SELECT coalesce(max(id), 0) AS id FROM events"
TOLD = """
SELECT e.id FROM events e JOIN tenants t ON t.id = e.tenant_id
WHERE t.name = 'chaos' AND e.id > %(after)s
  AND e.kind IN ('job.running', 'job.succeeded', 'job.partial', 'job.failed', 'job.cancelled',
                 'frames.succeeded')
"""
WAITING = """
SELECT (SELECT count(*) FROM webhook_events) + (
    SELECT count(*) FROM webhook_deliveries WHERE state IN ('pending', 'retrying')) AS waiting
"""
STATES = """
SELECT d.state, count(*) AS deliveries FROM webhook_deliveries d
WHERE d.webhook_id = %(id)s GROUP BY d.state
"""


@contextmanager
def bad_receivers(scene: ChaosRun) -> Iterator[None]:
    """Run couriers and endpoints during the block, then compare what came with the events."""
    couriers = [scene.stack.add_courier(number) for number in (1, 2)]
    with ExitStack() as running:
        receivers = {name: running.enter_context(receiving()) for name in behaviours(scene.random)}
        for name, answer in behaviours(scene.random).items():
            receivers[name].answer = answer
        hooks = {name: _endpoint(scene, receiver.url) for name, receiver in receivers.items()}
        after = scene.truth.rows(LAST)[0]["id"]
        yield
        with scene.noting_errors():
            wait_until(
                lambda: scene.truth.rows(WAITING)[0]["waiting"] == 0,
                SETTLE_SECONDS,
                "every message was delivered or dropped",
            )
        told = {f"msg_{row['id']}" for row in scene.truth.rows(TOLD, after=after)}
        for name, receiver in receivers.items():
            states = {
                row["state"]: row["deliveries"]
                for row in scene.truth.rows(STATES, id=hooks[name]["id"])
            }
            scene.problems += _wrong(name, receiver, hooks[name]["secret"], told, states)
    for courier in couriers:
        scene.stack.remove(courier)


def behaviours(chance: Random) -> dict[str, Callable[[Request], int]]:
    """Return the receivers, each with its answer to a request."""
    hung: list[Request] = []

    def slow(_: Request) -> int:
        if chance.random() < 0.1:
            time.sleep(chance.uniform(0.5, 2.0))
        return 200

    def hanging(request: Request) -> int:
        if len(hung) < 3:
            hung.append(request)
            time.sleep(HANGING_SECONDS)
        return 200

    return {
        "good": lambda _: 200,
        "slow": slow,
        "failing": lambda _: 500 if chance.random() < 0.1 else 204,
        "cutting": lambda _: CUT if chance.random() < 0.1 else 200,
        "hanging": hanging,
        GONE: lambda _: 410,
    }


def _endpoint(scene: ChaosRun, url: str) -> dict[str, str]:
    api = next(iter(scene.stack.apis.values()))
    answer = httpx.post(
        f"{api}/v1/webhooks",
        json={"url": url, "kinds": KINDS},
        headers={"Authorization": f"Bearer {scene.stack.api_key}"},
        timeout=30,
        trust_env=False,
    )
    assert answer.status_code == 201, answer.text
    made: dict[str, str] = answer.json()
    return made


def _wrong(
    name: str, receiver: Receiver, secret: str, told: set[str], states: dict[str, int]
) -> Iterator[str]:
    """Yield what is wrong with the requests of a receiver."""
    bodies: dict[str, bytes] = {}
    for request in receiver.requests:
        if not request.is_signed_by(secret, at=request.at):
            yield f"{name}: message {request.id} has a wrong signature"
        if bodies.setdefault(request.id, request.body) != request.body:
            yield f"{name}: message {request.id} came with two bodies"
    if name == GONE:
        if not receiver.requests or set(states) != {"dropped"}:
            yield f"{name}: {len(receiver.requests)} requests, and deliveries {states}"
        return
    if missing := told - bodies.keys():
        yield f"{name}: {len(missing)} of {len(told)} messages never came"
    if set(states) != {"succeeded"}:
        yield f"{name}: deliveries {states}"
