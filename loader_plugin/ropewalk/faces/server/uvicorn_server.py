"""uvicorn, with our meaning of a graceful shutdown."""

from __future__ import annotations

import logging
import socket

import uvicorn

from ropewalk.faces.server.app import Service

logger = logging.getLogger(__name__)


class GracefulServer(uvicorn.Server):
    """On shutdown, finishes running replies and refuses waiting requests. A second Ctrl-C cuts the replies off."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn once it is asked to end."""
        self._service.drain()
        if self._service.engine.queue.num_running:
            logger.warning(
                "finishing %d replies; Ctrl-C once more cuts them off", self._service.engine.queue.num_running
            )
        await super().shutdown(sockets)
        await self._service.cut_off()
