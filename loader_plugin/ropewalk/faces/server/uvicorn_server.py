"""uvicorn, told what a graceful end means here."""

from __future__ import annotations

import logging
import socket

import uvicorn

from ropewalk.faces.server.app import Service

logger = logging.getLogger(__name__)


class GracefulServer(uvicorn.Server):
    """At the end finishes the replies that run, and refuses those that wait. A second Ctrl-C cuts them off."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What uvicorn calls once it is asked to end."""
        self._service.drain()
        if self._service.engine.queue.num_running:
            logger.warning(
                "finishing %d replies; Ctrl-C once more cuts them off", self._service.engine.queue.num_running
            )
        await super().shutdown(sockets)
        await self._service.cut_off()
