"""files/reader.py: large tensors are read by several threads, into memory that others have left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ropewalk import native
from ropewalk.base.errors import CheckpointError
from ropewalk.files import reader
from ropewalk.files.folder import Checkpoint
from ropewalk.files.reader import FileReader


@pytest.fixture
def tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Of 3,000 to 9,000 bytes, where a piece has 1,000."""
    monkeypatch.setattr(reader, "PIECE_BYTES", 1000)
    generator = torch.Generator().manual_seed(1)
    made = {
        "a.weight": torch.randn(3, 251, generator=generator),
        "b.qweight": torch.randint(-(2**31), 2**31 - 1, (7, 300), generator=generator).to(torch.int32),
        "b.scales": torch.randn(5, 301, generator=generator).half(),
    }
    save_file(made, tmp_path / "model.safetensors")
    return made


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("spare", [False, True])
def test_tensors_are_the_same_however_they_are_read(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, threads: int, spare: bool
) -> None:
    monkeypatch.setattr(reader, "SMALL_BYTES", 0)
    checkpoint = Checkpoint(tmp_path, None, FileReader(threads, native.SpareMemory().take if spare else None))
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
    with checkpoint.at_hand(["b"]):
        assert torch.equal(checkpoint.tensor("b.qweight"), tensors["b.qweight"])
        assert torch.equal(checkpoint.tensor("b.scales"), tensors["b.scales"])


@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_that_was_truncated_is_an_error_in_any_thread(
    tmp_path: Path, tensors: dict[str, torch.Tensor], threads: int
) -> None:
    checkpoint = Checkpoint(tmp_path, None, FileReader(threads))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(CheckpointError, match="has changed while it was being read"):
        checkpoint.tensor("b.qweight")


def test_memory_is_used_again_when_nobody_looks_at_it_any_more() -> None:
    memory = native.SpareMemory()
    first = memory.take(1 << 20)
    view = first[1000:2000].view(torch.int32)
    place = first.data_ptr()
    del first
    assert memory.num_bytes == 0  # the view still needs it
    view.fill_(7)
    assert memory.take(1 << 20).data_ptr() != place and bool((view == 7).all())
    del view
    assert memory.num_bytes == 2 << 20
    again = [memory.take(1 << 20), memory.take(1 << 20)]
    assert place in [tensor.data_ptr() for tensor in again] and memory.num_bytes == 0


def test_small_tensors_are_left_to_malloc() -> None:
    taken: list[int] = []
    files = FileReader(2, lambda size: taken.append(size) or torch.empty(size, dtype=torch.uint8))
    assert files.take(100).shape == (100,) and files.take(reader.SMALL_BYTES).shape == (reader.SMALL_BYTES,)
    assert taken == [reader.SMALL_BYTES]
