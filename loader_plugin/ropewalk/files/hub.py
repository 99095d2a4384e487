"""Downloads models by name from the Hugging Face hub (or what HF_ENDPOINT names), into the cache its programs share.

    list of files -> JSON and tokenizer files -> refused? -> room on the disk? -> the weight files that will be read

Pickled weights and code are never downloaded. huggingface_hub does the transfers: it resumes what was interrupted,
shows progress on stderr, and honours HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and tokens. If the hub cannot be asked, what
lies in the cache is used if it is complete.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ropewalk.base.errors import CheckpointError, UnsupportedError, brief
from ropewalk.base.json import MAX_FILE_BYTES
from ropewalk.base.memory import format_bytes
from ropewalk.config.model import load_model_config
from ropewalk.config.quantisation import load_quant_config
from ropewalk.files.names import ModelName
from ropewalk.files.weight_files import choose_among, choose_files

logger = logging.getLogger(__name__)

SMALL_ENDINGS = (".json", ".jinja")
SMALL_NAMES = ("tokenizer.model", "merges.txt", "vocab.txt")
SPARE_BYTES = 64 << 20  # left free on the disk
MOST_REVISIONS = 12  # named in a message
# Errors of the transport (no network, no such host, a timeout): the library below huggingface_hub differs by its
# version, but its HTTP errors always derive from the base class of that library's errors and from OSError.
NO_ANSWER = (*HfHubHTTPError.__bases__, OSError)


def fetch_model(name: ModelName, weights: bool = True) -> Path:
    """The folder of a model in the cache, complete; without `weights`, only its small files are made sure of.

    Raises:
        CheckpointError: no such model or revision, no permission, no answer and nothing in the cache, a full disk.
        UnsupportedError, ConfigError: the model is refused by its small files.
    """
    try:
        folder, sizes = fetch_small(name)
    except Unreachable as error:
        return cached(name, weights, str(error))
    if not weights:
        return folder
    chosen = choose_weights(name, folder, sizes)
    absent = sum(sizes[file] for file in chosen if not (folder / file).exists())
    if absent:
        _check_room(name, folder, absent)
        logger.info("%s: downloading %s", name, format_bytes(absent))
    return _download(name, chosen)


def fetch_small(name: ModelName) -> tuple[Path, dict[str, int]]:
    """The folder of a model in the cache with its small files, and the sizes of all its files.

    Raises:
        Unreachable: the hub cannot be asked.
        CheckpointError: as `fetch_model`.
    """
    with explained(name):
        listing = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in listing.siblings or ()}
    sizes = {file: size for file, size in sizes.items() if "/" not in file and not file.startswith(".")}
    return _download(name, [file for file, size in sizes.items() if _is_small(file) and size <= MAX_FILE_BYTES]), sizes


def _is_small(file: str) -> bool:
    return file.endswith(SMALL_ENDINGS) or file in SMALL_NAMES


def choose_weights(name: ModelName, folder: Path, sizes: Iterable[str]) -> list[str]:
    """Which of the files hold the weights; refuses what can be refused by the small files, which are there."""
    files = sorted(sizes)
    if "config.json" not in files:
        shown = ", ".join(files[:8]) or "nothing"
        what = "an adapter: name its base model, and give the adapter's folder with --adapter"
        advice = what if "adapter_config.json" in files else "not a model that transformers or ropewalk could load"
        raise UnsupportedError(f"{name} has no config.json (found: {shown}): it is {advice}")
    config = load_model_config(folder)
    quant = load_quant_config(folder, config.raw)
    entries = [folder / file for file in files]
    chosen, _ = choose_among(folder, entries, quant.model_file_base_name if quant else None)
    return [path.name for path in chosen]


def _check_room(name: ModelName, folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SPARE_BYTES:
        raise CheckpointError(
            f"{name} needs {format_bytes(num_bytes)} more in {constants.HF_HUB_CACHE}, and {format_bytes(free)} are "
            "free there: make room, or set HF_HOME to a folder on another disk"
        )


def _download(name: ModelName, files: list[str]) -> Path:
    try:
        with explained(name):
            patterns = [escape(file) for file in files]
            return Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=patterns))
    except Unreachable as error:
        raise CheckpointError(
            f"the download of {name} was interrupted: {error}. The same command goes on where it ended"
        ) from error


def cached(name: ModelName, weights: bool, why: str) -> Path:
    """The folder in the cache, if it has all that is needed. why: the hub is not asked, as a clause."""
    found = try_to_load_from_cache(name.repo, "config.json", revision=name.revision or "main")
    if not isinstance(found, str):
        raise CheckpointError(f"{name} is no folder here and not in the cache ({constants.HF_HUB_CACHE}), and {why}")
    folder = Path(found).parent
    if weights:
        config = load_model_config(folder)
        quant = load_quant_config(folder, config.raw)
        try:
            choose_files(folder, quant.model_file_base_name if quant else None)
        except CheckpointError as error:
            raise CheckpointError(f"{name} is not complete in the cache, and {why}: {error}") from error
    logger.warning("%s: taken from the cache as it is, because %s", name, why)
    return folder


class Unreachable(Exception):
    """The hub did not answer; the text says why, as a clause."""


@contextmanager
def explained(name: ModelName) -> Iterator[None]:
    """Turns the errors of huggingface_hub into sentences; those that a cache can help with into Unreachable."""
    hub = constants.ENDPOINT
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name.repo} is gated: accept its terms at {hub}/{name.repo}, then log in with `hf auth login` or set "
            "HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {name} here, and no model {name.repo} on {hub}; if it is a private one, log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name.repo} has no revision {name.revision}{_revisions(name)}") from error
    except HFValidationError as error:
        raise CheckpointError(f"{name} is neither a folder nor the name of a model: {brief(error)}") from error
    except OfflineModeIsEnabled as error:
        raise Unreachable("HF_HUB_OFFLINE says not to ask the hub") from error
    except (LocalEntryNotFoundError, EntryNotFoundError, *NO_ANSWER) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"{name}: the disk of {constants.HF_HUB_CACHE} is full: {error}") from error
        if isinstance(error, PermissionError):
            raise CheckpointError(f"{constants.HF_HUB_CACHE} cannot be written: {error.strerror}") from error
        raise Unreachable(f"{hub} cannot be asked ({brief(error, 120) or type(error).__name__})") from error


def _revisions(name: ModelName) -> str:
    """Those that there are, as the end of a message; nothing if they cannot be listed."""
    try:
        refs = HfApi().list_repo_refs(name.repo)
    except NO_ANSWER:
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    more = f" and {len(names) - MOST_REVISIONS} more" if len(names) > MOST_REVISIONS else ""
    return f"; it has {', '.join(names[:MOST_REVISIONS])}{more}"
