"""The server of an API process: uvicorn, which ends streams of events at once when it stops."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from api.streaming.feed import SEND_SECONDS
from api.streaming.streams import Streams

KEEP_ALIVE_SECONDS = 75
"""Time for which an idle connection is kept, in seconds: longer than others keep theirs.

Otherwise a client sends a call at the moment when it is closed. httpx keeps one for 5 s, as uvicorn
does; nginx and the load balancers of clouds for 60 s.
"""


class ApiServer(uvicorn.Server):
    """uvicorn waits for open requests when it stops. A stream would keep it waiting to the end."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        config.timeout_keep_alive = KEEP_ALIVE_SECONDS
        super().__init__(config)
        self._app = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve. The kernel ends connections whose client takes nothing.

        Otherwise a stream that was ended would keep its connection until its bytes are taken.
        """
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                if listener.family in (socket.AF_INET, socket.AF_INET6):  # accepted ones inherit it
                    listener.setsockopt(
                        socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(SEND_SECONDS * 1000)
                    )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all streams and waiting calls, then stop. Their clients go to another process."""
        streams: Streams = self._app.state.streams
        streams.feed.close()
        await super().shutdown(sockets)
