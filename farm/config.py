"""Settings: FARM_* variables, read once at an entry point and then passed in."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from farm import failpoints
from farm.errors import FarmError
from farm.redis_address import redis_place

ENV_FILE = "farm.env"
"""Name of a data folder's settings file: KEY=value lines, which a shell can read too."""
DEMO_CATALOG = Path(__file__).parent / "demo" / "pipelines.toml"


def _user_cache() -> Path:
    """Find the user's cache folder.

    Source: https://specifications.freedesktop.org/basedir-spec/latest/
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"


class Settings(BaseSettings):
    """All settings of a process. The variable of a field is FARM_ and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix="FARM_", extra="ignore")

    database_url: SecretStr = Field(
        default=SecretStr("postgresql://farm@127.0.0.1:5432/farm"),
        description="Address of Postgres, as a libpq URL",
    )
    redis_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"),
        description="Address of Redis or Valkey, Celery's broker",
    )
    s3_endpoint_url: str | None = Field(
        default=None, description="Address of the S3 server; leave it out for AWS"
    )
    s3_public_url: str = Field(
        default="",
        description="Address of the S3 server for clients, if they cannot reach"
        " FARM_S3_ENDPOINT_URL; download addresses use it. Example: https://images.example",
    )
    s3_addressing: Literal["path", "virtual"] = Field(
        default="path",
        description="Place of the bucket in an S3 address. path: https://HOST/BUCKET/KEY; virtual:"
        " https://BUCKET.HOST/KEY",
    )
    s3_bucket: str = Field(default="farm", description="Bucket that stores artifacts")
    api_url: str = Field(
        default="http://127.0.0.1:8000",
        description="Address of the API, for the command line",
    )
    api_key: SecretStr | None = Field(default=None, description="API key of the command line")
    pipelines: Path = Field(
        default=DEMO_CATALOG, description="Path of the catalog, pipelines.toml or pipelines.json"
    )

    lease_seconds: float = Field(
        default=30.0, gt=0, description="Length of a lease that is not renewed. Seconds"
    )
    heartbeat_seconds: float = Field(
        default=5.0, gt=0, description="Interval at which a worker renews its leases. Seconds"
    )
    progress_seconds: float = Field(
        default=0.5,
        gt=0,
        description="Minimum interval between two progress reports to Postgres; each also checks"
        " for cancellation. Seconds",
    )
    transaction_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Idle time after which Postgres ends a transaction: its holder was stopped."
        " Seconds",
    )
    sweep_seconds: float = Field(
        default=1.0, gt=0, description="Interval of the janitor's sweeps. Seconds"
    )
    worker_timeout_seconds: float = Field(
        default=20.0,
        gt=0,
        description="Time without a sign of life after which a worker counts as gone. Seconds",
    )
    step_timeout_seconds: float = Field(
        default=600.0,
        gt=0,
        description="Time without progress after which a worker ends its render process. Seconds",
    )
    retry_seconds: float = Field(
        default=1.0,
        ge=0,
        description="Delay before a frame's second attempt; doubled for each further one, up to a"
        " minute. Seconds",
    )
    trip_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Pause of a worker that is tripped: three different frames failed in a row."
        " Doubled each time, up to five minutes. Seconds",
    )
    scratch_dir: Path = Field(
        default_factory=lambda: Path(tempfile.gettempdir()) / f"farm-{os.getuid()}",
        description="Folder in which a worker keeps images while the storage is unavailable, and"
        " `farm exporter` the shard that it writes",
    )
    run_dir: Path | None = Field(
        default=None,
        description="Folder in which a worker, janitor or exporter shows that it lives: its loop"
        " touches the file `beat`, and the file `ready` is there while it can work",
    )
    cache_dir: Path = Field(
        default_factory=lambda: _user_cache() / "farm",
        description="Folder in which workers keep compiled graphs and hashes of weights",
    )
    spool_bytes: int = Field(
        default=2 * 2**30,
        ge=0,
        description="Maximum size of the images that a worker keeps in FARM_SCRATCH_DIR. Bytes",
    )
    grace_seconds: float = Field(
        default=60.0,
        gt=0,
        description="Time that a stopping worker has to finish its batch. Seconds",
    )
    session_days: float = Field(
        default=7.0, gt=0, le=365, description="Length of a login to the web page. Days"
    )
    trusted_proxies: str = Field(
        default_factory=lambda: os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1,::1"),
        description="Proxies whose X-Forwarded-Proto and X-Forwarded-For headers are trusted:"
        " addresses and networks, separated by commas, for example 10.0.0.5,10.1.0.0/16; * for all",
    )
    wait_seconds: float = Field(
        default=60.0,
        ge=0,
        le=3600,
        description="Longest time that a call waits for the end of a job (`Prefer: wait`). Set it"
        " below the timeout of a proxy before the farm. Seconds",
    )
    openai_seconds: float = Field(
        default=300.0,
        gt=0,
        le=600,
        description="Longest time that a call of OpenAI's image API waits. Seconds",
    )
    events_days: float = Field(default=30.0, gt=0, description="Time that events are kept. Days")
    actions_days: float = Field(
        default=400.0, ge=0, description="Time that the log of actions is kept. Days. 0: no end"
    )
    price_per_device_hour: float | None = Field(
        default=None,
        ge=0,
        description="Price of an hour of a device, for the costs of usage. Any currency",
    )
    retention_days: float = Field(
        default=0.0,
        ge=0,
        description="Time that a job or an export is kept after its end, and an input that no job"
        " uses. Days; 0 keeps them forever",
    )
    orphan_seconds: float = Field(
        default=86_400.0,
        ge=0,
        description="Age after which a stored object that no frame refers to is deleted. Seconds",
    )
    torch_threads: int = Field(
        default=0, ge=0, description="torch threads of a worker; 0 lets torch choose"
    )

    preempt: bool = Field(
        default=True,
        description="Render an interactive batch in the middle of another one, between two steps",
    )
    interactive_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Longest wait of an interactive frame for interactive batches of another"
        " tenant. Seconds",
    )
    less_urgent_share: float = Field(
        default=0.1,
        ge=0,
        le=0.9,
        description="Smallest part of a lane's device time for less urgent work, while it waits",
    )

    max_job_frames: int = Field(
        default=10_000_000, ge=1, description="Maximum number of frames in a job"
    )
    max_job_prompts: int = Field(
        default=100_000, ge=1, description="Maximum number of prompts in one request"
    )
    max_prompt_chars: int = Field(
        default=8_000, ge=1, description="Maximum length of a prompt. Characters"
    )
    max_grid_points: int = Field(
        default=1_000, ge=1, description="Maximum number of combinations in a grid"
    )
    max_body_bytes: int = Field(
        default=16 * 2**20, ge=1, description="Maximum size of a request's body. Bytes"
    )
    max_input_bytes: int = Field(
        default=4 * 2**30, ge=1, description="Maximum size of an input, unpacked. Bytes"
    )
    max_image_bytes: int = Field(
        default=16 * 2**20,
        ge=1,
        description="Maximum size of a control image's file, as sent. Bytes",
    )
    max_image_pixels: int = Field(
        default=4096 * 4096,
        ge=64,
        le=2**27,
        description="Maximum width times height of a control image. Pixels",
    )
    public_url: str = Field(
        default="",
        description="Address of the API for clients; signed addresses of images begin with it."
        " Without it they begin with that of the request. Example: https://farm.example",
    )
    webhook_networks: str = Field(
        default="",
        description="Networks of yours that webhooks may reach though they are not public, also by"
        " http and at any port, separated by commas. Example: 10.1.0.0/16,192.168.7.3",
    )
    webhook_pace: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Factor of the times between attempts at a webhook, for trying: with 0.001 the"
        " ten attempts take minutes",
    )
    signed_url_seconds: int = Field(
        default=604_800,
        ge=0,
        le=31_536_000,
        description="Minimum lifetime of a signed address of an image; 0 gives none. Seconds",
    )
    key_seconds: float = Field(
        default=5.0,
        ge=0,
        le=60,
        description="Time for which an API process trusts a key that it has looked up. A revoked"
        " key is refused after it. Seconds",
    )
    presign_seconds: int = Field(
        default=600, ge=1, description="Lifetime of an image's download address. Seconds"
    )
    otlp_endpoint: str = Field(
        default_factory=lambda: os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""),
        description="OTLP/HTTP receiver that traces are sent to, for example http://collector:4318;"
        " leave it empty to send none",
    )
    log_level: str = Field(
        default="INFO", description="Lowest level that is logged: DEBUG, INFO, WARNING or ERROR"
    )
    environment: Literal["production", "development"] = Field(
        default="production",
        description="production refuses FARM_FAILPOINTS, FARM_DISCARD_IMAGES and"
        " FARM_SIMULATED_GPUS; development allows them",
    )
    failpoints: str = Field(
        default="",
        description="Places to fail on purpose, as point=action:text, for example"
        " render.step=oom:BIG; several are separated by semicolons",
    )
    simulated_gpus: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Number of CUDA devices that this machine claims to have, to test placement",
    )
    discard_images: bool = Field(
        default=False,
        description="Render and encode images without storing them, to measure everything else",
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

    @field_validator("s3_public_url")
    @classmethod
    def _public_url_is_an_origin(cls, url: str) -> str:
        parts = urlsplit(url)
        if url and not (parts.scheme in ("http", "https") and parts.hostname):
            raise ValueError(f"{url!r} is not an address. Example: https://images.example")
        if parts.path.strip("/") or parts.query or parts.fragment or parts.username:
            raise ValueError(
                f"{url!r} has more than scheme, host and port. Example: https://images.example"
            )
        return url.rstrip("/")

    @field_validator("webhook_networks")
    @classmethod
    def _networks_are_networks(cls, networks: str) -> str:
        for word in filter(None, (each.strip() for each in networks.split(","))):
            try:
                ip_network(word)
            except ValueError as error:
                raise ValueError(f"{error}. Examples: 10.1.0.0/16, 192.168.7.3") from error
        return networks

    @field_validator("public_url")
    @classmethod
    def _public_url_is_a_place(cls, url: str) -> str:
        parts = urlsplit(url)
        if url and not (parts.scheme in ("http", "https") and parts.hostname):
            raise ValueError(f"{url!r} is not an address. Example: https://farm.example")
        if parts.query or parts.fragment or parts.username:
            raise ValueError(
                f"{url!r} has more than scheme, host, port and path. Example: https://farm.example"
            )
        return url.rstrip("/")

    @field_validator("otlp_endpoint")
    @classmethod
    def _endpoint_is_http(cls, endpoint: str) -> str:
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise ValueError(
                "this address (or that of OTEL_EXPORTER_OTLP_ENDPOINT) must begin with http:// or"
                " https://"
            )
        return endpoint

    @model_validator(mode="after")
    def _only_in_development(self) -> Settings:
        unsafe = {
            "FARM_FAILPOINTS": failpoints.parse(self.failpoints),
            "FARM_DISCARD_IMAGES": self.discard_images,
            "FARM_SIMULATED_GPUS": self.simulated_gpus,
        }
        for name, given in unsafe.items():
            if given and self.environment == "production":
                raise ValueError(
                    f"{name} is refused in production. Remove it, or set "
                    "FARM_ENVIRONMENT=development"
                )
        return self


def load_settings() -> Settings:
    """Read the settings: FARM_* variables first, then FARM_DATA's farm.env, then the defaults."""
    data = os.environ.get("FARM_DATA")
    if data:
        key_file = Path(data) / "api-key"
        if key_file.is_file():
            os.environ.setdefault("FARM_API_KEY", key_file.read_text().strip())
        for name, value in load_env(Path(data)).items():
            os.environ.setdefault(name, value)  # boto3 reads AWS_* from there itself
    return Settings()


def load_env(data: Path) -> dict[str, str]:
    """Read the FARM_* and AWS_* variables in `data`/farm.env. Return {} without that file."""
    path = data / ENV_FILE
    if not path.is_file():
        return {}
    words = (word for line in path.read_text().splitlines() for word in _words(line))
    return dict(word.split("=", 1) for word in words if "=" in word)


def format_env(env: Mapping[str, str]) -> str:
    """Format variables as lines that `load_env`, `sh` and dotenv all read."""
    return "".join(f"{key}={shlex.quote(value)}\n" for key, value in env.items())


def _words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def make_private(root: Path) -> None:
    """Create FARM_SCRATCH_DIR, which only its owner may write to.

    Any other user who could write to it could replace images.

    Raises:
        FarmError: the folder belongs to another user, or others may write to it.
        OSError: the folder cannot be created.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = root.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise FarmError(
            f"FARM_SCRATCH_DIR: {root} belongs to another user, or others can write to it. "
            "Choose another folder."
        )
