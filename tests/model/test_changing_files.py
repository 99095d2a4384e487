"""A loaded model does not need its files any more, and files that change while they are read are an error."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gptq_writer import write_checkpoint
from ropewalk.base.errors import CheckpointError
from ropewalk.model import loader
from ropewalk.model.loader import load_model

CHILD = """
    import sys
    from pathlib import Path
    import torch
    import ropewalk

    first, second, backend, damage = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    options = {"threads": 1} if backend == "cpu" else {}
    model = ropewalk.load_model(
        first, backend=backend, second_folder=second, layer_order="a:0-1,b:0-1", max_seq_len=64, **options
    )
    ids = list(range(40))
    before = model.forward(ids, model.new_cache(), logits="all")
    for path in (*first.glob("*.safetensors"), *second.glob("*.safetensors")):
        if damage == "truncate":
            path.open("r+b").truncate(0)
        elif damage == "overwrite":
            size = path.stat().st_size
            with path.open("r+b") as file:
                file.write(bytes(size))
        else:
            path.unlink()
    after = model.forward(ids, model.new_cache(), logits="all")
    assert torch.equal(before, after), "the logits have changed"
    print("unchanged")
"""


@pytest.mark.parametrize("damage", ["truncate", "overwrite", "delete"])
@pytest.mark.parametrize("kind", ["gptq", "dense", "tied"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_running_model_does_not_notice_what_becomes_of_its_files(tmp_path, backend, kind, damage):
    """In a process of its own: where a file is mapped, truncating it kills the process."""
    for name in ("first", "second"):
        write_checkpoint(tmp_path / name, {"tie_word_embeddings": kind == "tied"}, dense=kind != "gptq")
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path / "first"), str(tmp_path / "second")]
    run = subprocess.run([*command, backend, damage], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout) == (0, "unchanged\n"), run.stderr[-2000:]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_file_that_is_truncated_while_it_is_loaded_is_an_error_that_names_it(tmp_path, monkeypatch, backend):
    write_checkpoint(tmp_path, dense=False)
    read_layer = loader.read_layer

    def truncating(config, quant, checkpoint, index):
        layer = read_layer(config, quant, checkpoint, index)
        path = next(Path(tmp_path).glob("*.safetensors"))
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        return layer

    monkeypatch.setattr(loader, "read_layer", truncating)
    with pytest.raises(CheckpointError, match=r"\.safetensors has changed while it was being read: load the model"):
        load_model(tmp_path, backend=backend)


def test_a_tied_table_is_held_once_also_where_the_file_stores_it_twice(tmp_path):
    write_checkpoint(tmp_path, {"tie_word_embeddings": True}, dense=True)
    model = load_model(tmp_path, backend="reference", head_bits=16)
    (head,) = model.weights.head.parts
    assert head.weight.data_ptr() == model.weights.embeddings.data_ptr()
