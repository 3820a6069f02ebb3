"""Forms of OpenAI's image API, for the OpenAPI document. Its field names are not ours."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from api.openai.wishes import MAX_IMAGES, MAX_PARTIAL_IMAGES
from farm.domain.spec import MAX_LABEL_CHARS


class Generation(BaseModel):
    """Body of a call for pictures. Parameters of the pipeline are fields of it too."""

    model_config = ConfigDict(extra="allow")

    prompt: str
    model: str | None = Field(
        default=None, description="Name of a pipeline; may be left out if there is only one"
    )
    n: int = Field(default=1, ge=1, le=MAX_IMAGES, description="Number of pictures")
    size: str = Field(default="auto", description="Width x height in pixels, such as 512x512")
    response_format: Literal["b64_json", "url", "base64"] | None = Field(
        default=None, description="Form of the pictures; null: both"
    )
    output_format: Literal["png", "jpeg", "jpg", "webp"] = "png"
    stream: bool = Field(default=False, description="Send each picture as an event")
    partial_images: int = Field(
        default=0, ge=0, le=MAX_PARTIAL_IMAGES, description="Fewer may come, or none"
    )
    seed: int | None = Field(default=None, description="Seed of the first picture")
    user: str | None = Field(
        default=None, max_length=MAX_LABEL_CHARS, description="Becomes a label of the job"
    )


class Picture(BaseModel):
    """One picture."""

    index: int = Field(description="Ordinal of its frame")
    type: Literal["b64_json", "url"]
    b64_json: str | None = Field(default=None, description="The file, in base64")
    url: str | None = Field(default=None, description="Address of the file that needs no key")
    revised_prompt: str = Field(description="The prompt, unchanged")
    seed: int
    sha256: str = Field(description="SHA-256 of the file, in hex")
    frame: str = Field(description="Path of the frame on this API")


class JobOfCall(BaseModel):
    """The job of a call."""

    job: str = Field(description="ID of the job")
    device_seconds: float
    waited_seconds: float | None = Field(description="Time until its first frame began")
    flagged: list[int] = Field(description="Frames that the safety checker kept back")
    failed: list[int] = Field(description="Other frames without a picture")


class Images(BaseModel):
    """Answer to a call for pictures."""

    id: str = Field(description="ID of the job")
    created: int = Field(description="Time of the submission, in Unix seconds")
    object: Literal["list"]
    model: str
    background: str
    output_format: str
    quality: str
    size: str
    data: list[Picture]
    usage: dict[str, int | dict[str, int]] = Field(description="Zeros: the farm counts no tokens")
    farm: JobOfCall


class Model(BaseModel):
    """A pipeline of the catalog."""

    id: str = Field(description="Name of the pipeline")
    object: Literal["model"] = "model"
    created: int = Field(description="Time at which this process read the catalog, in Unix seconds")
    owned_by: Literal["farm"] = "farm"


class Models(BaseModel):
    """The pipelines of the catalog."""

    object: Literal["list"] = "list"
    data: list[Model]
