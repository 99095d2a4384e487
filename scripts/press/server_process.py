"""A server in a process of its own, for the scripts that put it under load."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import httpx

KEPT_LINES = 50


class ServerProcess:
    """`ropewalk serve` with these options on a free port, while in a `with` block. log: what it wrote last."""

    def __init__(self, options: Sequence[str]) -> None:
        self.log: deque[str] = deque(maxlen=KEPT_LINES)
        command = [sys.executable, "-m", "ropewalk", "serve", *options, "--port", "0"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8")
        self.url = self._read_url()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The id of its process."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.poll()

    def health(self) -> dict[str, object]:
        """What the server says about itself."""
        return httpx.get(f"{self.url}/health", timeout=10).json()

    def metrics(self) -> dict[str, float]:
        """All numbers, by name and labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def resident_bytes(self) -> int:
        """Memory that the process has now."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))

    def end(self, patience_s: float = 60) -> None:
        """End the server gracefully.

        Raises:
            RuntimeError: it does not end.
        """
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            raise RuntimeError(f"the server did not end within {patience_s:g} s") from error

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def _read_url(self) -> str:
        for line in self._process.stderr:
            self.log.append(line)
            if line.strip().startswith("URL"):
                return line.split()[1].removesuffix("/v1")
        raise RuntimeError("the server did not start:\n" + "".join(self.log))

    def _read_log(self) -> None:
        for line in self._process.stderr:
            self.log.append(line)
