"""Settings: FARM_* variables, read once at an entry point and then passed in."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from farm import failpoints
from farm.errors import FarmError
from farm.redis_address import redis_place

ENV_FILE = "farm.env"
"""Settings of a data folder, as KEY=value lines, which a shell can read too."""
DEMO_CATALOG = Path(__file__).parent / "demo" / "pipelines.toml"


def _user_cache() -> Path:
    """Where a user's caches lie: https://specifications.freedesktop.org/basedir-spec/latest/"""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"


class Settings(BaseSettings):
    """Everything a process of the farm can be told; every field has the variable FARM_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="FARM_", extra="ignore")

    database_url: SecretStr = Field(
        default=SecretStr("postgresql://farm@127.0.0.1:5432/farm"),
        description="Postgres, as libpq URL",
    )
    redis_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"),
        description="Redis or Valkey: Celery's broker",
    )
    s3_endpoint_url: str | None = Field(default=None, description="left out for AWS itself")
    s3_bucket: str = Field(default="farm", description="where artifacts are stored")
    api_url: str = Field(
        default="http://127.0.0.1:8000", description="the API, for the command line"
    )
    api_key: SecretStr | None = Field(default=None, description="the key the command line uses")
    pipelines: Path = Field(default=DEMO_CATALOG, description="the catalog, pipelines.toml")

    lease_seconds: float = Field(
        default=30.0, gt=0, description="how long a claim lasts unless renewed"
    )
    heartbeat_seconds: float = Field(
        default=5.0, gt=0, description="how often a worker renews its leases"
    )
    progress_seconds: float = Field(
        default=0.5, gt=0, description="how often, at most, the step hook asks whether to go on"
    )
    transaction_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Postgres ends a transaction left idle for so long: its holder was stopped",
    )
    sweep_seconds: float = Field(default=1.0, gt=0, description="the janitor's pace")
    worker_timeout_seconds: float = Field(
        default=20.0, gt=0, description="a worker unseen for so long counts as gone"
    )
    step_timeout_seconds: float = Field(
        default=600.0,
        gt=0,
        description="a child that shows no step for so long is ended by its parent",
    )
    retry_seconds: float = Field(
        default=1.0,
        ge=0,
        description="back-off before a frame's second attempt, doubled up to a minute",
    )
    trip_seconds: float = Field(
        default=10.0,
        gt=0,
        description="how long a worker rests after three different frames failed in a row; doubled"
        " while they go on failing, up to five minutes",
    )
    scratch_dir: Path = Field(
        default_factory=lambda: Path(tempfile.gettempdir()) / f"farm-{os.getuid()}",
        description="where a worker keeps pictures while the storage is away, and `farm exporter` "
        "a shard while it writes it",
    )
    cache_dir: Path = Field(
        default_factory=lambda: _user_cache() / "farm",
        description="where workers keep compiled graphs and weights' hashes between starts",
    )
    spool_bytes: int = Field(
        default=2 * 2**30, ge=0, description="bytes of pictures that a worker keeps so at most"
    )
    grace_seconds: float = Field(
        default=60.0, gt=0, description="how long a worker may finish its batch"
    )
    session_days: float = Field(
        default=7.0, gt=0, le=365, description="days until a session of the page ends"
    )
    trusted_proxies: str = Field(
        default_factory=lambda: os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1,::1"),
        description="comma-separated addresses and networks of proxies whose X-Forwarded-Proto and"
        " X-Forwarded-For headers are trusted, such as 10.0.0.0/8; *: all",
    )
    events_days: float = Field(default=30.0, gt=0, description="how long events are kept")
    retention_days: float = Field(
        default=0.0,
        ge=0,
        description="how long a job or an export is kept after its end, and an input that no job "
        "draws; 0: for ever",
    )
    orphan_seconds: float = Field(
        default=86_400.0, ge=0, description="objects that no frame names are deleted when older"
    )
    torch_threads: int = Field(
        default=0, ge=0, description="torch threads a worker; 0: as torch chooses"
    )

    preempt: bool = Field(
        default=True,
        description="whether an interactive batch is rendered in the middle of another one",
    )

    max_job_frames: int = Field(default=10_000_000, ge=1, description="frames a job may hold")
    max_job_prompts: int = Field(default=100_000, ge=1, description="prompts in one request")
    max_prompt_chars: int = Field(default=8_000, ge=1, description="characters a prompt may hold")
    max_grid_points: int = Field(default=1_000, ge=1, description="combinations a grid may span")
    max_body_bytes: int = Field(
        default=16 * 2**20, ge=1, description="bytes a request's body may hold"
    )
    max_input_bytes: int = Field(
        default=4 * 2**30, ge=1, description="bytes an input may hold, unpacked"
    )
    max_image_bytes: int = Field(
        default=16 * 2**20, ge=1, description="bytes a control image may have as it is sent"
    )
    max_image_pixels: int = Field(
        default=4096 * 4096,
        ge=64,
        le=2**27,
        description="width times height of a control image",
    )
    presign_seconds: int = Field(default=600, ge=1, description="how long an image's address lasts")
    otlp_endpoint: str = Field(
        default_factory=lambda: os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""),
        description="the OTLP/HTTP receiver that traces are sent to; none are where it is empty",
    )
    log_level: str = Field(default="INFO", description="DEBUG, INFO, WARNING or ERROR")
    environment: Literal["production", "development"] = Field(
        default="production",
        description="failpoints and discarding pictures are refused in production",
    )
    failpoints: str = Field(default="", description="where to fail on purpose: point=action:text")
    discard_images: bool = Field(
        default=False, description="store no picture, for measuring what all the rest takes"
    )

    @field_validator("redis_url")
    @classmethod
    def _redis_has_a_place(cls, url: SecretStr) -> SecretStr:
        redis_place(url.get_secret_value())
        return url

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies_are_addresses(cls, proxies: str) -> str:
        for place in filter(None, (each.strip() for each in proxies.split(","))):
            try:
                place == "*" or ip_network(place)
            except ValueError as error:
                raise ValueError(
                    f"{place!r} is not an address or a network. Examples: 10.0.0.5, 10.0.0.0/8, *"
                ) from error
        return proxies

    @field_validator("otlp_endpoint")
    @classmethod
    def _endpoint_is_http(cls, endpoint: str) -> str:
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise ValueError(
                "it, or else OTEL_EXPORTER_OTLP_ENDPOINT, must begin with http:// or https://"
            )
        return endpoint

    @model_validator(mode="after")
    def _only_in_development(self) -> Settings:
        unsafe = {
            "FARM_FAILPOINTS": failpoints.parse(self.failpoints),
            "FARM_DISCARD_IMAGES": self.discard_images,
        }
        for name, given in unsafe.items():
            if given and self.environment == "production":
                raise ValueError(f"{name} is set: FARM_ENVIRONMENT must then be development")
        return self


def load_settings() -> Settings:
    """Read the settings: FARM_* variables first, then FARM_DATA's farm.env, then the defaults."""
    data = os.environ.get("FARM_DATA")
    if data:
        key_file = Path(data) / "api-key"
        if key_file.is_file():
            os.environ.setdefault("FARM_API_KEY", key_file.read_text().strip())
        for name, value in load_env(Path(data)).items():
            os.environ.setdefault(name, value)  # boto3 looks for AWS_* there itself
    return Settings()


def load_env(data: Path) -> dict[str, str]:
    """Read `data`/farm.env: FARM_* and AWS_* variables; empty when there is no such file."""
    path = data / ENV_FILE
    if not path.is_file():
        return {}
    words = (word for line in path.read_text().splitlines() for word in _words(line))
    return dict(word.split("=", 1) for word in words if "=" in word)


def format_env(env: Mapping[str, str]) -> str:
    """Lines that `load_env`, `sh` and dotenv read alike."""
    return "".join(f"{key}={shlex.quote(value)}\n" for key, value in env.items())


def _words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def make_private(root: Path) -> None:
    """Make FARM_SCRATCH_DIR, a folder that nobody else may write to.

    Whoever could, could exchange pictures.

    Raises:
        FarmError: it is somebody else's, or others may write to it.
        OSError: it cannot be made.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = root.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise FarmError(f"FARM_SCRATCH_DIR: {root} can be written by others; choose another.")
