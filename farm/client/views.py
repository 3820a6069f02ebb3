"""Fields of jobs and images, for `Farm` and `AsyncFarm`: all that needs no call."""

from __future__ import annotations

import hashlib
from pathlib import Path

from farm.client.core import JobFailed
from farm.client.objects import Frame, JobData, Picture
from farm.domain.image_formats import FORMATS
from farm.domain.states import TERMINAL
from farm.errors import FarmError


class JobView:
    """A job, as it was when it was read last."""

    data: JobData
    """All fields, as the API sends them: see docs/api.md."""

    @property
    def id(self) -> str:
        """The job's ID."""
        return self.data["id"]

    @property
    def pipeline(self) -> str:
        """Name of its pipeline."""
        return self.data["pipeline"]

    @property
    def status(self) -> str:
        """Such as `queued`, `running`, `succeeded`, `partial`, `failed` or `cancelled`."""
        return self.data["status"]

    @property
    def ended(self) -> bool:
        """True if no frame follows, unless dead ones are retried."""
        return self.status in TERMINAL

    @property
    def total(self) -> int:
        """Number of its frames."""
        return self.data["total"]

    @property
    def counts(self) -> dict[str, int]:
        """Number of its frames in each state."""
        return self.data["counts"]

    @property
    def progress(self) -> float:
        """Part of its frames that have ended, from 0 to 1."""
        return self.data["progress"]

    @property
    def labels(self) -> dict[str, str]:
        """Your own labels."""
        return self.data["labels"]

    @property
    def waiting_because(self) -> str | None:
        """A sentence that says why it waits. None: it does not."""
        return self.data["waiting_because"]

    def require_success(self) -> None:
        """Check that the job has not ended without some of its images.

        Raises:
            JobFailed: it has.
        """
        if self.ended and self.status != "succeeded":
            raise JobFailed(self.data)

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.status}>"


class ImageView:
    """An image of a job."""

    data: Frame
    """All fields of its frame, as the API sends them."""

    @property
    def ordinal(self) -> int:
        """Place in the job, from 0."""
        return self.data["ordinal"]

    @property
    def prompt(self) -> str:
        """Text that it was rendered from."""
        return self.data["prompt"]

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.data["seed"]

    @property
    def key(self) -> str | None:
        """Your own ID of the line of an input. None: it has none."""
        return self.data.get("key")

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        found = self.data["sha256"]
        assert found is not None  # it succeeded
        return found

    @property
    def url(self) -> str:
        """Address of the file on the farm. Reading it needs the key."""
        found = self.data["image_url"]
        assert found is not None  # it succeeded
        return found

    @property
    def signed_url(self) -> str | None:
        """Whole address of the file that needs no key, until it ends. None: an operator must set
        FARM_PUBLIC_URL."""
        return self.data.get("signed_url")

    @property
    def file_name(self) -> str:
        """Its name in a folder: ORDINAL-SEED.png, .jpg or .webp."""
        return file_name(self.data)

    def is_whole(self, content: bytes) -> bool:
        """Return True if these are the bytes that were rendered."""
        return hashlib.sha256(content).hexdigest() == self.sha256

    def checked(self, content: bytes) -> bytes:
        """Return the file's bytes.

        Raises:
            FarmError: they are not those that were rendered.
        """
        if not self.is_whole(content):
            raise FarmError(
                f"The image of frame {self.ordinal} is damaged: its bytes do not match its sha256 "
                f"{self.sha256}."
            )
        return content

    def __repr__(self) -> str:
        return f"<Image {self.file_name}>"


def file_name(frame: Picture) -> str:
    """Return the file name of a frame's image: ORDINAL-SEED.png, .jpg or .webp."""
    kind = FORMATS[frame.get("format", "png")]  # an older farm has no such field
    return f"{int(frame['ordinal'])}-{int(frame['seed'])}.{kind.extension}"  # and no path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_bytes(content)
    draft.replace(path)
