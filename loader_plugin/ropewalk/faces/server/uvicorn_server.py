"""uvicorn, with our meaning of a graceful shutdown."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn

from ropewalk.faces.server.app import Service

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0  # for clients that are slow to take what is written, or to send what they began
POLL_S = 0.1


class GracefulServer(uvicorn.Server):
    """On shutdown, finishes running replies and refuses waiting requests; clients that stall are dropped then. A second
    Ctrl-C, or SIGTERM, cuts the replies off."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn with a signal to end; its own counts Ctrl-C alone as a second one."""
        is_second = self.should_exit
        super().handle_exit(sig, frame)
        self.force_exit = self.force_exit or is_second

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn once it is asked to end."""
        self._service.drain()
        if self._service.engine.queue.num_running:
            logger.warning(
                "finishing %d replies; Ctrl-C once more cuts them off", self._service.engine.queue.num_running
            )
        dropping = asyncio.create_task(self._drop_stalled())
        try:
            await super().shutdown(sockets)
        finally:
            dropping.cancel()
        await self._service.cut_off()

    async def _drop_stalled(self) -> None:
        """Close what is still open a while after the last reply was written."""
        while self._service.engine.queue.num_running:
            await asyncio.sleep(POLL_S)
        await asyncio.sleep(PATIENCE_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
