"""A network in which nothing comes or goes while a browser is tested.

Chromium drops what it is fetching when an address of the machine changes, be it of another interface, and the page then
waits for an answer for ever. Machines whose addresses change by themselves are common: virtual ones, and laptops.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNET = 0x40000000  # linux/sched.h
SIOCSIFFLAGS, IFF_UP = 0x8914, 1  # linux/sockios.h, linux/if.h


@contextmanager
def quiet_network() -> Iterator[bool]:
    """This thread, and every thread and process that it starts, sees a network of its own with the loopback alone.

    Yields whether it does: that takes Linux and the rights of its administrator; without them nothing changes.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    own = Path("/proc/thread-self/ns/net")
    if not own.exists():
        yield False
        return
    with own.open("rb") as before:
        is_quiet = libc.unshare(CLONE_NEWNET) == 0
        if is_quiet:
            _raise_loopback()
        try:
            yield is_quiet
        finally:
            if is_quiet and libc.setns(before.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "the network before could not be taken up again")


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))
