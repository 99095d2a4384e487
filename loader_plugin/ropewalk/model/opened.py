"""A checkpoint as loading uses it: its tensors checked, what goes wrong meanwhile told as its error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ropewalk.base.errors import CheckpointError
from ropewalk.config.model import ModelConfig
from ropewalk.config.quantisation import QuantConfig
from ropewalk.files.folder import Checkpoint
from ropewalk.files.reader import FileReader
from ropewalk.weights.read import check_tensors


@contextmanager
def open_weights(
    folder: Path, config: ModelConfig, quant: QuantConfig | None, reader: FileReader
) -> Iterator[Checkpoint]:
    """The checkpoint as `opened` gives it, its tensors checked. reader: of the backend that is going to pack them."""
    with opened(folder, quant, reader) as checkpoint:
        check_tensors(config, quant, checkpoint)
        yield checkpoint


@contextmanager
def opened(folder: Path, quant: QuantConfig | None, reader: FileReader | None = None) -> Iterator[Checkpoint]:
    """The checkpoint; an OSError or MemoryError while it is in use becomes a CheckpointError."""
    try:
        with Checkpoint(folder, quant.model_file_base_name if quant else None, reader) as checkpoint:
            yield checkpoint
    except MemoryError as error:
        detail = f": {error}" if str(error) else ""  # of a card: which, and how much of it is free
        raise CheckpointError(f"{folder}: not enough memory to load the weights{detail}") from error
    except OSError as error:
        raise CheckpointError(f"{folder}: reading the weights failed: {error}") from error
