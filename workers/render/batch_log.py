"""Log file of a child's current batch. Its parent reads the file when the child has died."""

from __future__ import annotations

import faulthandler
import logging
import os
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class BatchLog(logging.Handler):
    """A log of the current batch. A crash adds the Python stack of every thread."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        # Unbuffered: a line survives a crash. Appending: after a truncation the next line is at the
        # beginning.
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            log.warning("%s cannot be written: %s", path, error)
            self._file = Path(os.devnull).open("ab", buffering=0)  # noqa: SIM115 - see close
        self.setFormatter(logging.Formatter(FORMAT))

    def listen(self) -> None:
        """Record the log of the process, and its stacks when it crashes."""
        logging.getLogger().addHandler(self)
        faulthandler.enable(self._file)

    def begin(self) -> None:
        """Erase the log of the previous batch."""
        with suppress(OSError):  # a device has no length
            self._file.truncate(0)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        with suppress(OSError, ValueError):  # a full disk must not cause a log line per line
            self._file.write(f"{self.format(record)}\n".encode(errors="replace"))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
