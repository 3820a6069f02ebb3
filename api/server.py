"""The server of an API process: uvicorn, which ends streams of events at once when it stops."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from api.streaming.streams import Streams


class ApiServer(uvicorn.Server):
    """uvicorn waits for open requests when it stops. A stream would keep it waiting to the end."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all streams and waiting calls, then stop. Their clients go to another process."""
        streams: Streams = self._app.state.streams
        streams.feed.close()
        await super().shutdown(sockets)
