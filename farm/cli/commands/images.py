"""`farm images`: upload control images from files and URLs.

The command line downloads the URLs: the farm itself never downloads anything.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm import __version__
from farm.cli.submission.body import ControlWord
from farm.cli.terminal.console import Json, emit, note, say
from farm.cli.terminal.progress import spinning
from farm.errors import InvalidRequest, Unavailable

if TYPE_CHECKING:
    import httpx

    from farm.cli.client.http import FarmClient
    from farm.client.objects import ControlImage

FETCH_SECONDS = 120.0
"""Maximum total time to download a URL, in seconds."""
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 30.0
"""Maximum time that its server may send nothing, in seconds."""


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
            metavar="PATH_OR_URL...",
            help="PNG, JPEG or WebP files. With --delete: image IDs.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
    delete: Annotated[
        bool,
        typer.Option("--delete", help="Delete control images. Pass their IDs instead of files."),
    ] = False,
) -> None:
    """Upload control images, and print the ID of each.

    The ID depends only on the picture: uploading it again returns the same ID. Pass the ID to
    `farm submit --control`.

    Example: farm images edges.png https://example.com/pose.jpg
    """
    from farm.cli.client.http import FarmClient
    from farm.config import load_settings

    settings = load_settings()
    with FarmClient.of(settings) as client:
        for source in sources:
            if delete:
                client.delete_image(source)
                note(f"Image {source} is deleted.")
                continue
            image = upload(client, read_image(source, settings.max_image_bytes))
            if as_json:
                emit(image)
            else:
                say(image["id"])


def control_field(
    client: FarmClient, controls: Sequence[ControlWord], limit: int
) -> list[dict[str, object]]:
    """Upload every image that is not an ID yet, and build the field `control` of a job.

    Raises:
        InvalidRequest: a file cannot be read or has an unsupported type; nothing is sent.
    """
    from farm.domain.image_formats import is_image_id

    given = [word.source for word in controls]
    files = {
        source: read_image(source, limit)
        for source in dict.fromkeys(given)
        if not is_image_id(source)
    }
    ids = {source: upload(client, file)["id"] for source, file in files.items()}
    return [{"image": ids.get(word.source, word.source), **word.settings} for word in controls]


class ImageFiles:
    """Control images that a table names. Each distinct file is uploaded once."""

    def __init__(self, client: FarmClient, limit: int, folder: Path) -> None:
        """Prepare to upload files of at most `limit` bytes. Paths are relative to `folder`."""
        self._client, self._limit, self._folder = client, limit, folder
        self._by_source: dict[str, str] = {}
        self._by_hash: dict[bytes, str] = {}

    def id_of(self, source: str) -> str:
        """Return the ID of an image, which is given by its path, URL or ID.

        Raises:
            InvalidRequest: it cannot be read, or the farm refused it.
        """
        from farm.domain.image_formats import is_image_id

        if is_image_id(source):
            return source
        if source not in self._by_source:
            remote = "://" in source
            file = read_image(source if remote else str(self._folder / source), self._limit)
            digest = sha256(file.content).digest()
            if digest not in self._by_hash:
                self._by_hash[digest] = upload(self._client, file)["id"]
            self._by_source[source] = self._by_hash[digest]
        return self._by_source[source]


def upload(client: FarmClient, file: ImageFile) -> ControlImage:
    """Upload a file, and return the image as the API describes it.

    Raises:
        InvalidRequest: the farm refused the file.
    """
    try:
        with spinning(f"Uploading {file.source}"):
            return client.upload(file.content, file.media_type)
    except InvalidRequest as error:  # the API's message does not name the file
        raise InvalidRequest(f"{file.source}: {error.message}", param=error.param) from error


def read_image(source: str, limit: int) -> ImageFile:
    """Read a file or download a URL, of at most `limit` bytes.

    Raises:
        InvalidRequest: it cannot be read, is larger, or has an unsupported type.
        Unavailable: the URL does not answer.
    """
    from farm.domain.image_formats import media_type_of

    remote = source.lower().startswith(("http://", "https://"))
    content = _fetched(source, limit) if remote else _read(source, limit)
    media_type = media_type_of(content)
    if media_type is None:
        raise InvalidRequest(
            f"{source} is not a PNG, JPEG or WebP file. Convert it to one of them.", param="image"
        )
    return ImageFile(source, content, media_type)


def _read(path: str, limit: int) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return _joined([file.read(limit + 1)], path, limit)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from error


def _joined(chunks: Iterable[bytes], source: str, limit: int) -> bytes:
    """Join chunks, up to the limit."""
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

    from farm.client.address import LOOPBACK

    # A compressed answer could be small and still unpack to more than fits into memory.
    headers = {"User-Agent": f"farm/{__version__}", "Accept-Encoding": "identity"}
    timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
    try:
        local = httpx.URL(url).host in LOOPBACK
        with (
            spinning(f"Downloading {url}"),
            httpx.Client(
                headers=headers, timeout=timeout, follow_redirects=True, trust_env=not local
            ) as client,
            client.stream("GET", url) as response,
        ):
            return _joined(_chunks(response, url), url, limit)
    except httpx.InvalidURL as error:
        raise InvalidRequest(f"{url} is not a valid URL: {error}.") from error
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise Unavailable(f"{url} cannot be downloaded: {reason}.") from error


def _chunks(response: httpx.Response, url: str) -> Iterable[bytes]:
    if not response.is_success:
        answer = f"{response.status_code} {response.reason_phrase}".strip()
        raise InvalidRequest(f"{url} cannot be downloaded: {response.url.host} answered {answer}.")
    started = time.monotonic()
    for chunk in response.iter_raw():
        if time.monotonic() - started > FETCH_SECONDS:
            raise Unavailable(f"{url} cannot be downloaded within {FETCH_SECONDS:.0f} seconds.")
        yield chunk
