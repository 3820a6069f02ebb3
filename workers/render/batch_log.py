"""What a child logs of its batch, kept where its parent finds it when the child is gone."""

from __future__ import annotations

import faulthandler
import logging
import os
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class BatchLog(logging.Handler):
    """A log of the batch in hand; a crash adds the Python stack of every thread."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        # Unbuffered and appending: a line stands there whatever comes next, and after a truncation
        # the next one stands at the beginning.
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            log.warning("%s cannot be written: %s", path, error)
            self._file = Path(os.devnull).open("ab", buffering=0)  # noqa: SIM115 - see close
        self.setFormatter(logging.Formatter(FORMAT))

    def listen(self) -> None:
        """Take down what the process logs, and where it is when it crashes."""
        logging.getLogger().addHandler(self)
        faulthandler.enable(self._file)

    def begin(self) -> None:
        """Forget what was said of the batch before."""
        with suppress(OSError):  # a device has no length
            self._file.truncate(0)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        with suppress(OSError, ValueError):  # a full disk must not add a line about each line
            self._file.write(f"{self.format(record)}\n".encode(errors="replace"))

    def close(self) -> None:
        """Give the file back."""
        self._file.close()
        super().close()
