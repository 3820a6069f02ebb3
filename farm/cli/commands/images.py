"""`farm images`: control images, uploaded from files and addresses.

The command line fetches what an address names: the farm itself never fetches anything.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from farm import __version__
from farm.cli.submit_body import ControlWord
from farm.cli.terminal.console import Json, emit, note, say
from farm.cli.terminal.progress import spinning
from farm.errors import InvalidRequest, Unavailable

if TYPE_CHECKING:
    import httpx

    from farm.cli.client.http import FarmClient

FETCH_SECONDS = 120.0
"""How long fetching an address may take in all."""
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 30.0
"""How long its server may say nothing."""


@dataclass(frozen=True)
class ImageFile:
    """A file to upload."""

    source: str
    content: bytes
    media_type: str


def images(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH_OR_URL...", help="PNG, JPEG or WebP files.", show_default=False
        ),
    ],
    as_json: Json = False,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete images. Give their IDs instead of files.")
    ] = False,
) -> None:
    """Upload control images, and print the id of each.

    The id stands for the picture itself: the same one has the same id. Jobs name it in `control`.
    """
    from farm.cli.client.http import FarmClient
    from farm.config import load_settings

    settings = load_settings()
    with FarmClient.of(settings) as client:
        for source in sources:
            if delete:
                client.delete(f"/v1/images/{quote(source, safe='')}")
                note(f"Image {source} is deleted.")
                continue
            image = upload(client, read_image(source, settings.max_image_bytes))
            if as_json:
                emit(image)
            else:
                say(image["id"])


def control_field(
    client: FarmClient, controls: Sequence[ControlWord], limit: int
) -> list[dict[str, Any]]:
    """Upload what is no id already, and lay out a job's field `control`.

    Raises:
        InvalidRequest: a file cannot be read, or is none that the farm takes; nothing is sent.
    """
    from farm.imaging.uploads import is_image_id

    given = [word.source for word in controls]
    files = {
        source: read_image(source, limit)
        for source in dict.fromkeys(given)
        if not is_image_id(source)
    }
    ids = {source: upload(client, file)["id"] for source, file in files.items()}
    return [{"image": ids.get(word.source, word.source), **word.settings} for word in controls]


def upload(client: FarmClient, file: ImageFile) -> Any:
    """Send a file; returns the image as the API tells it.

    Raises:
        InvalidRequest: the farm refused it.
    """
    try:
        with spinning(f"Uploading {file.source}"):
            return client.upload(file.content, file.media_type)
    except InvalidRequest as error:  # it knows what is wrong, but not with which file
        raise InvalidRequest(f"{file.source}: {error.message}", param=error.param) from error


def read_image(source: str, limit: int) -> ImageFile:
    """Read a path or fetch an address, of at most `limit` bytes.

    Raises:
        InvalidRequest: it cannot be read, is larger, or is no kind of file that the farm takes.
        Unavailable: the address does not answer.
    """
    from farm.imaging.uploads import media_type_of

    remote = source.lower().startswith(("http://", "https://"))
    content = _fetched(source, limit) if remote else _read(source, limit)
    media_type = media_type_of(content)
    if media_type is None:
        raise InvalidRequest(f"{source} is no PNG, JPEG or WebP file.", param="image")
    return ImageFile(source, content, media_type)


def _read(path: str, limit: int) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return _joined([file.read(limit + 1)], path, limit)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from error


def _joined(chunks: Iterable[bytes], source: str, limit: int) -> bytes:
    """Put chunks together, as long as they keep to the limit."""
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > limit:
            raise InvalidRequest(
                f"{source} is larger than the limit of {limit} bytes (FARM_MAX_IMAGE_BYTES)."
            )
    return bytes(content)


def _fetched(url: str, limit: int) -> bytes:
    import httpx

    from farm.cli.client.address import LOOPBACK

    # Packed, a small answer could unfold to more than memory holds.
    headers = {"User-Agent": f"farm/{__version__}", "Accept-Encoding": "identity"}
    timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
    try:
        local = httpx.URL(url).host in LOOPBACK
        with (
            spinning(f"Fetching {url}"),
            httpx.Client(
                headers=headers, timeout=timeout, follow_redirects=True, trust_env=not local
            ) as client,
            client.stream("GET", url) as response,
        ):
            return _joined(_chunks(response, url), url, limit)
    except httpx.InvalidURL as error:
        raise InvalidRequest(f"{url} is no address: {error}.") from error
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise Unavailable(f"{url} cannot be fetched: {reason}.") from error


def _chunks(response: httpx.Response, url: str) -> Iterable[bytes]:
    if not response.is_success:
        answer = f"{response.status_code} {response.reason_phrase}".strip()
        raise InvalidRequest(f"{url} cannot be fetched: {response.url.host} said {answer}.")
    started = time.monotonic()
    for chunk in response.iter_raw():
        if time.monotonic() - started > FETCH_SECONDS:
            raise Unavailable(f"{url} cannot be fetched within {FETCH_SECONDS:.0f} seconds.")
        yield chunk
