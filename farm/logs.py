"""Log lines, the same in every process: time, level, module, message."""

from __future__ import annotations

import logging
import sys


def set_up_logs(level: str) -> None:
    """Write log lines of `level` and above to standard error."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logging.captureWarnings(capture=True)
    for noisy in ("alembic", "botocore", "boto3", "urllib3", "celery", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
