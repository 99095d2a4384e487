"""What describes a model on the hub: its small files, and the headers of its weight files, by requests for a range.

A header goes to the beginning of a file that has the size of the real one and is empty otherwise, so that whoever looks
at names, shapes and sizes sees what a downloaded model would show. Weights in the cache are used where they lie.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from ropewalk.base.errors import CheckpointError
from ropewalk.files.hub import Unreachable, cached, choose_weights, explained, fetch_small
from ropewalk.files.names import ModelName
from ropewalk.files.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES
from ropewalk.files.weight_files import INDEX_SUFFIX

FIRST_BYTES = 1 << 18  # of a file; what most headers fit in
TIMEOUT_S = 30.0


def fetch_headers(name: ModelName, scratch: Path) -> tuple[Path, Path]:
    """(folder in the cache with the small files, folder with the weight files or their headers).

    scratch: an empty folder, which becomes the second one if the weights are not all in the cache.

    Raises:
        CheckpointError, UnsupportedError, ConfigError: as `fetch_model`.
    """
    try:
        folder, sizes = fetch_small(name)
        chosen = choose_weights(name, folder, sizes)
        if all((folder / file).exists() for file in chosen):
            return folder, folder
        for index in folder.glob(f"*{INDEX_SUFFIX}"):
            (scratch / index.name).symlink_to(index.resolve())
        for file in chosen:
            _write_header(name, file, sizes[file], scratch / file)
    except Unreachable as error:
        folder = cached(name, True, str(error))
        return folder, folder
    return folder, scratch


def _write_header(name: ModelName, file: str, num_bytes: int, path: Path) -> None:
    """A file of `num_bytes` bytes that begins as the one on the hub does, up to its values."""
    begin = _range(name, file, 0, min(FIRST_BYTES, num_bytes)) if num_bytes else b""
    end = LENGTH_BYTES + int.from_bytes(begin[:LENGTH_BYTES], "little")
    if len(begin) < end <= min(num_bytes, LENGTH_BYTES + MAX_HEADER_BYTES):
        begin += _range(name, file, len(begin), end)
    try:
        path.write_bytes(begin[:end])
        os.truncate(path, num_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def _range(name: ModelName, file: str, first: int, end: int) -> bytes:
    """Bytes first..end of a file on the hub; nothing behind them is read, even where all of the file is sent."""
    url = hf_hub_url(name.repo, file, revision=name.revision)
    headers = {**build_hf_headers(), "Range": f"bytes={first}-{end - 1}"}
    content = b""
    with explained(name), _streamed(url, headers) as answer:
        hf_raise_for_status(answer)
        if answer.status_code != 206 and first:
            raise CheckpointError(f"{url} cannot be read in parts: give a folder, or load the model to download it")
        for piece in answer.iter_bytes() if hasattr(answer, "iter_bytes") else answer.iter_content(1 << 16):
            content += piece
            if len(content) >= end - first:
                break
    return content[: end - first]


@contextmanager
def _streamed(url: str, headers: dict[str, str]) -> Iterator[Any]:
    """The answer before its content is read: of httpx since huggingface_hub 1, of requests before."""
    session = get_session()
    if not hasattr(session, "stream"):
        with session.get(url, headers=headers, timeout=TIMEOUT_S, stream=True) as answer:
            yield answer
        return
    with session.stream("GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as answer:
        if answer.status_code >= 400:
            answer.read()  # what is wrong
        yield answer
