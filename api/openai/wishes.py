"""Reads a call of OpenAI's image API as a job of the farm. No I/O."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from farm.domain.spec import CANONICAL, MAX_LABEL_CHARS
from farm.errors import FarmError, InvalidRequest, NotFound

MAX_IMAGES = 10
MAX_PARTIAL_IMAGES = 3
SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})", re.ASCII)

WITHOUT_EFFECT = (
    "background",
    "disable_safety_checker",
    "input_fidelity",
    "moderation",
    "output_compression",
    "quality",
    "style",
)
"""Fields that are accepted and change nothing. The answer names them."""
ALIASES = {"guidance": "guidance_scale", "num_inference_steps": "steps"}
"""Names that other programs use with this API, and the farm's."""
REPLACED = {
    "grid": "one of its values",
    "images_per_prompt": "`n`",
    "input": "`prompt`",
    "pipeline": "`model`",
    "prompts": "`prompt`",
}
"""Fields of a job that this call has in another form."""
THEIR_NAMES = {
    "format": "output_format",
    "images_per_prompt": "n",
    "pipeline": "model",
    "prompts": "prompt",
    "prompts.0": "prompt",
}
FORMS = {None: None, "url": "url", "b64_json": "b64_json", "base64": "b64_json"}
"""Forms of a picture in an answer, by `response_format`. None: both. Together says base64."""


class BadRequest(InvalidRequest):
    """A value is not allowed for its field. Clients of OpenAI expect the status 400."""

    status = 400


class UnknownModel(NotFound):
    """The catalog has no such pipeline."""

    code = "model_not_found"


@dataclass(frozen=True)
class Wish:
    """A call for pictures."""

    job: dict[str, Any]
    """Body of the job, as `POST /v1/jobs` takes it."""
    form: str | None
    """Form of the pictures: "url", "b64_json", or None for both."""
    stream: bool
    partial_images: int
    """Number of previews of each picture in a stream, if there are so many."""
    ignored: list[str]
    """Fields that have no effect."""
    names: Mapping[str, str]
    """Names of the call's fields, by those of the job's."""
    content: bytes
    """The call in canonical form."""

    def digest(self, key_id: uuid.UUID) -> bytes:
        """Return the SHA-256 of an API key and the call. A repeated call has the same."""
        return hashlib.sha256(key_id.bytes + self.content).digest()


def read_wish(body: Any, models: Sequence[str]) -> Wish:
    """Read the body of a call. Fields that it does not know are left to the check of the job.

    Raises:
        BadRequest: A field is wrong.
        UnknownModel: There is no such pipeline.
    """
    if not isinstance(body, dict):
        raise BadRequest('Send a JSON object, such as {"model": "demo", "prompt": "a star"}.')
    sent = {name: value for name, value in body.items() if value is not None}
    fields = dict(sent)
    form = fields.pop("response_format", None)
    if not (form is None or isinstance(form, str)) or form not in FORMS:
        raise BadRequest("response_format: send url or b64_json.", param="response_format")
    stream = fields.pop("stream", False)
    if not isinstance(stream, bool):
        raise BadRequest("stream: send true or false.", param="stream")
    partial_images = fields.pop("partial_images", 0)
    return Wish(
        job=_job(fields, models),
        form=FORMS[form],
        stream=stream,
        partial_images=_whole_number(partial_images, "partial_images", 0, MAX_PARTIAL_IMAGES),
        ignored=[name for name in WITHOUT_EFFECT if name in sent],
        names=_names(sent),
        content=CANONICAL.encode(body).encode(),
    )


def _names(sent: Collection[str]) -> dict[str, str]:
    aliases = {name: alias for alias, name in ALIASES.items() if alias in sent}
    sides = dict.fromkeys(("width", "height"), "size") if "size" in sent else {}
    labels = {} if "labels" in sent else {"labels": "metadata"}
    return {**THEIR_NAMES, **aliases, **sides, **labels}


def _job(fields: dict[str, Any], models: Sequence[str]) -> dict[str, Any]:
    if fields.get("background") == "transparent":
        raise BadRequest(
            "background: the farm renders opaque pictures. Leave it out.", param="background"
        )
    for name in WITHOUT_EFFECT:
        fields.pop(name, None)
    for name, instead in REPLACED.items():
        if name in fields:
            raise BadRequest(f"{name}: not a field of this call. Send {instead}.", param=name)
    if "prompt" not in fields:
        raise BadRequest('prompt: missing. Send a text, such as "a star".', param="prompt")
    job = {
        "pipeline": _model(fields.pop("model", None), models),
        "prompts": [fields.pop("prompt")],
        "images_per_prompt": _whole_number(fields.pop("n", 1), "n", 1, MAX_IMAGES),
        "labels": _labels(fields),
        **_size(fields),
    }
    if "output_format" in fields:
        if "format" in fields:
            raise BadRequest("format: it means output_format. Send one.", param="format")
        form = fields.pop("output_format")
        job["format"] = "jpeg" if form == "jpg" else form
    for alias, name in ALIASES.items():
        if alias in fields:
            if name in fields:
                raise BadRequest(f"{alias}: it means {name}. Send one of the two.", param=alias)
            fields[name] = fields.pop(alias)
    return {**job, **fields}


def _model(name: object, models: Sequence[str]) -> str:
    names = ", ".join(models)
    if name is None and len(models) == 1:
        return models[0]
    if not isinstance(name, str):
        raise BadRequest(f"model: name one of {names}.", param="model")
    if name not in models:
        raise UnknownModel(
            f"model: there is no model {name[:100]!r}. Use one of {names}.", param="model"
        )
    return name


def _size(fields: dict[str, Any]) -> dict[str, int]:
    size = fields.pop("size", "auto")
    if size == "auto":
        return {}
    found = SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise BadRequest(
            'size: send "auto", or width x height in pixels, such as "512x512".', param="size"
        )
    if "width" in fields or "height" in fields:
        raise BadRequest("size: send it, or width and height.", param="size")
    return {"width": int(found[1]), "height": int(found[2])}


def _labels(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the labels of the job: those that the call names, and its fields that are about it."""
    labels: dict[str, Any] = {}
    for name in ("metadata", "labels"):
        if name == "metadata" and isinstance(fields.get(name), str):
            continue  # the farm's field of this name: what image files hold
        given = fields.pop(name, {})
        if not isinstance(given, dict):
            raise BadRequest(f'{name}: send an object, such as {{"team": "art"}}.', param=name)
        labels |= {key: _label(value, f"{name}.{key}") for key, value in given.items()}
    for name in ("user", "safety_identifier"):
        if name in fields:
            labels[name] = _label(fields.pop(name), name)
    return {**labels, "dialect": "openai"}


def _label(value: object, name: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_LABEL_CHARS:
        name = name[:MAX_LABEL_CHARS]
        raise BadRequest(
            f"{name}: send a text of at most {MAX_LABEL_CHARS} characters.", param=name
        )
    return value


def _whole_number(value: object, name: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadRequest(f"{name}: send a number from {least} to {most}.", param=name)
    return value


def in_their_words(error: FarmError, wish: Wish) -> FarmError:
    """Return an error about a field of the job as one about the field of the call."""
    if not isinstance(error, InvalidRequest):
        return error
    param, message = error.param, error.message
    if param is not None and param in wish.names:
        name = wish.names[param]
        return BadRequest(f"{name}: {message.removeprefix(f'{param}: ')}", param=name)
    return BadRequest(message, param=param)
