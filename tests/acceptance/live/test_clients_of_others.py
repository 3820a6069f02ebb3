"""Clients of other programs, unmodified: they call the farm, and verify what it sends.

`make test-slow` installs them: `pip install '.[clients]'`.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import import_module
from typing import Any

import httpx
import pytest

from tests.acceptance.farms import LiveFarm
from tests.support.receiver import Request, receiving
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    # Their own imports and models warn.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
STAR = "a red star on a blue background"
SEED = 7


def digests(live: LiveFarm, **fields: Any) -> list[str]:
    """Render the same job by the farm's own API."""
    job = live.submit(pipeline="demo", prompts=[STAR], **fields)
    assert live.ended(job["id"])["status"] == "succeeded"
    return [frame["sha256"] for frame in live.frames(job["id"])]


def test_litellm_renders(live: LiveFarm) -> None:
    answer = import_module("litellm").image_generation(
        prompt=STAR,
        model="openai/demo",
        api_base=f"{live.farm.url}/openai/v1",
        api_key=live.farm.api_key,
        n=2,
        seed=SEED,
        steps=12,
    )
    found = [hashlib.sha256(base64.b64decode(each["b64_json"])).hexdigest() for each in answer.data]
    assert found == digests(live, images_per_prompt=2, seed=SEED, steps=12)


def test_litellm_tells_what_is_wrong(live: LiveFarm) -> None:
    litellm = import_module("litellm")
    with pytest.raises(litellm.BadRequestError, match="steps: Input should be"):
        litellm.image_generation(
            prompt=STAR,
            model="openai/demo",
            api_base=f"{live.farm.url}/openai/v1",
            api_key=live.farm.api_key,
            steps=0,
        )


def test_langchain_renders(live: LiveFarm) -> None:
    tool = import_module("langchain_community.utilities.dalle_image_generator").DallEAPIWrapper(
        model="demo",
        base_url=f"{live.farm.url}/openai/v1",
        api_key=live.farm.api_key,
        size="64x64",
        n=1,
    )
    address = tool.run(STAR)
    answer = httpx.get(address).raise_for_status()
    assert answer.headers["content-type"] == "image/png"


@pytest.fixture(scope="module")
def delivered(live: LiveFarm) -> tuple[str, Request]:
    """A webhook's request, and the secret that signed it."""
    with receiving() as receiver:
        live.submit(pipeline="demo", prompts=[STAR], steps=2, webhook={"url": receiver.url})
        [request] = wait_until(lambda: receiver.requests, 60, "the message arrives")
    secret: str = live.get("/v1/webhooks/secret")["secret"]
    return secret, request


def test_standardwebhooks_verifies(delivered: tuple[str, Request]) -> None:
    secret, request = delivered
    hook = import_module("standardwebhooks").Webhook(secret)
    assert hook.verify(request.body, request.headers) == request.message


def test_svix_verifies(delivered: tuple[str, Request]) -> None:
    secret, request = delivered
    svix = import_module("svix.webhooks")
    svix.Webhook(secret).verify(request.body, request.headers)
    with pytest.raises(svix.WebhookVerificationError):
        svix.Webhook(secret).verify(request.body + b" ", request.headers)


def test_replicate_verifies(delivered: tuple[str, Request]) -> None:
    secret, request = delivered
    replicate = import_module("replicate.webhook")
    known = replicate.WebhookSigningSecret(key=secret)
    sent = replicate.Webhooks
    sent.validate(headers=request.headers, body=request.body.decode(), secret=known)
    damaged = request.body.decode().replace("succeeded", "failed")
    with pytest.raises(replicate.InvalidSignatureError):
        sent.validate(headers=request.headers, body=damaged, secret=known)


def test_openai_verifies(delivered: tuple[str, Request]) -> None:
    secret, request = delivered
    openai = import_module("openai")
    client = openai.OpenAI(api_key="none", webhook_secret=secret)
    client.webhooks.verify_signature(request.body, request.headers)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(request.body + b" ", request.headers)
