"""What a child says of its batch, kept where its parent finds it when the child is gone."""

from __future__ import annotations

import faulthandler
import logging
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Words(logging.Handler):
    """A log of the batch in hand; a crash adds the Python stack of every thread."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        # Unbuffered and appending: a line stands there whatever comes next, and after a truncation
        # the next one stands at the beginning.
        self._file = path.open("ab", buffering=0)
        self.setFormatter(logging.Formatter(FORMAT))

    def listen(self) -> None:
        """Take down what the process logs, and where it is when it crashes."""
        logging.getLogger().addHandler(self)
        faulthandler.enable(self._file)

    def begin(self) -> None:
        """Forget what was said of the batch before."""
        self._file.truncate(0)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        try:
            self._file.write(f"{self.format(record)}\n".encode(errors="replace"))
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Give the file back."""
        self._file.close()
        super().close()
