"""files/folder.py, weight_files.py, safetensors.py: which files are read, what a damaged one says, and memory."""

from __future__ import annotations

import gc
import json
import logging
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ropewalk.base.errors import CheckpointError, UnsupportedError
from ropewalk.files.folder import Checkpoint
from ropewalk.files.safetensors import SafetensorsFile

TENSOR = torch.arange(6, dtype=torch.float32).view(2, 3)


def write(path: Path, **tensors: torch.Tensor) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in (tensors or {"w": TENSOR}).items()}, path)
    return path


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with this header (JSON text, or an object to be dumped) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# Tensors


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    + [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8],
)
def test_every_dtype_comes_back_as_written(tmp_path, dtype):
    original = torch.arange(-6, 6).to(dtype).view(3, 4)
    write(tmp_path / "model.safetensors", w=original, flag=torch.tensor([True, False]), empty=torch.empty(0, 4))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensor("w").dtype == dtype
        assert torch.equal(checkpoint.tensor("w"), original)
        assert checkpoint.tensor("flag").tolist() == [True, False]
        assert checkpoint.tensor("empty").shape == (0, 4)
        assert checkpoint.info("w").shape == (3, 4)
        assert set(checkpoint.names()) == {"w", "flag", "empty"}
        assert checkpoint.total_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_scalars_keep_their_empty_shape(tmp_path):
    write(tmp_path / "model.safetensors", w=torch.tensor(4.5))
    assert Checkpoint(tmp_path).tensor("w").item() == 4.5


def test_every_tensor_has_memory_of_its_own(tmp_path):
    path = write(tmp_path / "model.safetensors", a=TENSOR, b=TENSOR + 1)
    checkpoint = Checkpoint(tmp_path)
    first, second = checkpoint.tensor("a"), checkpoint.tensor("a")
    first.zero_()
    path.write_bytes(b"")
    assert torch.equal(second, TENSOR)


def test_a_tensor_is_compared_with_the_file_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("ropewalk.files.safetensors.PIECE_BYTES", 16)
    last_differs = torch.cat([TENSOR.flatten()[:-1], torch.tensor([9.0])]).view(2, 3)
    write(tmp_path / "model.safetensors", a=TENSOR, b=last_differs, c=TENSOR.half(), d=TENSOR.flatten())
    checkpoint = Checkpoint(tmp_path)
    assert [name for name in "abcd" if checkpoint.holds(name, TENSOR)] == ["a"]


def test_a_header_that_misaligns_the_data_is_read_all_the_same(tmp_path):
    header = json.dumps({"w": entry(shape=[6], offsets=[0, 24])}).encode()
    header += b" " * ((5 - len(header)) % 8)
    write_raw(tmp_path / "model.safetensors", header, TENSOR.numpy().tobytes())
    assert torch.equal(Checkpoint(tmp_path).tensor("w"), TENSOR.flatten())


def test_parts_that_are_not_needed_any_more_do_not_add_up_in_memory(tmp_path):
    """Reading a 512 MB file part by part keeps the growth of resident memory near one part."""
    part = torch.ones(8 << 20, dtype=torch.int32)  # 32 MiB
    write(tmp_path / "model.safetensors", **{f"layer{i}": part.clone() for i in range(16)})
    del part
    gc.collect()
    with Checkpoint(tmp_path) as checkpoint:
        before = peak = resident_bytes()
        for i in range(16):
            assert int(checkpoint.tensor(f"layer{i}").sum()) == 8 << 20
            peak = max(peak, resident_bytes())
    assert peak - before < 128 << 20


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("resident memory is read from /proc, which this system lacks")
    return int(statm.read_text().split()[1]) * 4096


def test_warnings_are_logged_once_per_kind(tmp_path, caplog):
    write(tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with caplog.at_level(logging.WARNING):
        for text in ("first", "second"):
            checkpoint.warn_once("kind", text)
    assert caplog.messages == ["first"]


# Which files are read


def chosen(folder: Path, base_name: str | None = None) -> list[str]:
    return [path.name for path in Checkpoint(folder, base_name).files]


@pytest.mark.parametrize(
    ("names", "base_name", "expected"),
    [
        (["X-GPTQ-4bit-128g.no-act-order"], None, "X-GPTQ-4bit-128g.no-act-order"),
        (["gptq_model-4bit--1g", "model"], None, "gptq_model-4bit--1g"),
        (["gptq_model-4bit-128g", "other"], None, "gptq_model-4bit-128g"),
        (["model", "consolidated"], None, "model"),
        (["4bit-128g", "zzz"], None, "4bit-128g"),
        (["a", "b"], "b", "b"),
        (["a"], "absent", "a"),
        (["gptq_model-4bit-128g", "b"], "b", "b"),
        (["model", "adapter_model"], None, "model"),
        (["weights", "adapter_model"], None, "weights"),
        (["模型 ü"], None, "模型 ü"),
    ],
)
def test_the_file_is_chosen_by_base_name_then_usual_name_then_alone(tmp_path, names, base_name, expected):
    for name in names:
        write(tmp_path / f"{name}.safetensors")
    (tmp_path / "._model.safetensors").write_bytes(b"AppleDouble")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert chosen(tmp_path, base_name) == [f"{expected}.safetensors"]


def test_several_candidates_are_an_error_that_lists_them(tmp_path):
    write(tmp_path / "a.safetensors")
    write(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"2 weight files.*a\.safetensors, b\.safetensors.*model_file_base_name"):
        Checkpoint(tmp_path)


def test_two_variants_of_the_usual_name_are_ambiguous(tmp_path):
    write(tmp_path / "gptq_model-4bit-128g.safetensors")
    write(tmp_path / "gptq_model-4bit-32g.safetensors")
    with pytest.raises(CheckpointError, match="2 weight files"):
        Checkpoint(tmp_path)
    assert chosen(tmp_path, "gptq_model-4bit-32g") == ["gptq_model-4bit-32g.safetensors"]


def test_the_index_goes_before_everything_and_unlisted_tensors_count(tmp_path):
    write(tmp_path / "one.safetensors", a=TENSOR, extra=TENSOR)
    write(tmp_path / "two.safetensors", b=TENSOR)
    write(tmp_path / "model.safetensors", c=TENSOR)
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    checkpoint = Checkpoint(tmp_path)
    assert [path.name for path in checkpoint.files] == ["one.safetensors", "two.safetensors"]
    assert set(checkpoint.names()) == {"a", "b", "extra"}
    assert checkpoint.info("b").file.name == "two.safetensors"


def test_the_index_decides_where_a_tensor_of_two_shards_is_read(tmp_path):
    write(tmp_path / "one.safetensors", a=TENSOR)
    write(tmp_path / "two.safetensors", a=TENSOR + 1, b=TENSOR)
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert torch.equal(Checkpoint(tmp_path).tensor("a"), TENSOR)


def test_gptq_indices_are_found_by_their_suffix(tmp_path):
    write(tmp_path / "one.safetensors", a=TENSOR)
    index = tmp_path / "gptq_model-4bit-128g.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert chosen(tmp_path) == ["one.safetensors"]
    (tmp_path / "other.safetensors.index.json").write_text(index.read_text())
    with pytest.raises(CheckpointError, match="2 index files"):
        Checkpoint(tmp_path)
    assert chosen(tmp_path, "gptq_model-4bit-128g") == ["one.safetensors"]


def test_complete_shards_need_no_index(tmp_path):
    write(tmp_path / "model-00001-of-00002.safetensors", a=TENSOR)
    with pytest.raises(CheckpointError, match="1 of 2 shards.*finish the download"):
        Checkpoint(tmp_path)
    write(tmp_path / "model-00002-of-00002.safetensors", b=TENSOR)
    assert set(Checkpoint(tmp_path).names()) == {"a", "b"}
    write(tmp_path / "model-00002-of-00002.safetensors", a=TENSOR)
    with pytest.raises(CheckpointError, match="tensor a is in both"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "file", ["../one.safetensors", "/one.safetensors", "sub\\one.safetensors", "one.bin", 5, None, "a\0.safetensors"]
)
def test_an_index_may_only_name_safetensors_of_its_folder(tmp_path, file):
    write(tmp_path / "one.safetensors", a=TENSOR)
    write_index(tmp_path, {"a": file})
    with pytest.raises(CheckpointError, match="tensor a is mapped to .* in the same folder"):
        Checkpoint(tmp_path)


def test_missing_shards_and_tensors_of_an_index_are_named(tmp_path):
    write(tmp_path / "one.safetensors", a=TENSOR)
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"1 of 2 files are missing \(two\.safetensors\): finish the download"):
        Checkpoint(tmp_path)
    write_index(tmp_path, {"a": "gone.safetensors"})
    with pytest.raises(CheckpointError, match=r"if the model is in one\.safetensors, delete the index"):
        Checkpoint(tmp_path)
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"does not match the index.*: b\."):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"weight_map": []}', '{"weight_map": {}}', "{}", "[" * 100_000])
def test_a_damaged_index_is_an_error(tmp_path, text):
    write(tmp_path / "one.safetensors", a=TENSOR)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("llama7b-4bit-128g.pt", r"torch\.load\(.*weights_only=True\).*save_file"),
        ("pytorch_model.bin", "convert it"),
        ("model.Q4_K_M.gguf", "llama.cpp"),
    ],
)
def test_other_weight_formats_are_refused_with_what_to_do(tmp_path, name, advice):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UnsupportedError, match=advice) as caught:
        Checkpoint(tmp_path)
    assert name in str(caught.value)


def test_folders_without_weights_say_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \.safetensors file \(found: nothing\)"):
        Checkpoint(tmp_path)
    write(tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="only an adapter"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be listed"):
        Checkpoint(tmp_path / "absent")


def test_a_missing_tensor_is_named(tmp_path):
    write(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'x\\ny' in model\.safetensors"):
        Checkpoint(tmp_path).tensor("x\ny")


# Damaged files


def test_a_directory_named_like_a_file_is_an_error(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is a directory"):
        Checkpoint(tmp_path)


def test_a_dangling_link_is_an_error(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 20, -1])
def test_truncated_files_are_named(tmp_path, length):
    path = write(tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged, truncated"):
        Checkpoint(tmp_path)


def test_trailing_bytes_are_refused_as_the_format_demands(tmp_path):
    path = write(tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes() + b"xx")
    with pytest.raises(CheckpointError, match="not fully covered"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"w": 1e',
        b'{"w": {}, "w": {}}',
        {"w": 1},
        {"w": {}},
        {"w": entry("F7")},
        {"w": entry(["F32"])},
        {"w": entry(shape=[-1])},
        {"w": entry(shape=[True])},
        {"w": entry(shape="22")},
        {"w": entry(shape=[1] * 17)},
        {"w": entry(shape=[2**63])},
        {"w": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])},
        {"w": entry(shape=[3])},
        {"w": entry(offsets=[8, 0])},
        {"w": entry(offsets=[0])},
        {"w": entry(offsets=[0, 8.0])},
        {"w": entry(offsets=[4, 12])},
        {"w": entry(), "v": entry()},
        {"w": entry(), "v": entry(offsets=[8, 16])},
        {"bad\nname": entry("F7")},
    ],
)
def test_damaged_headers_are_refused_with_file_and_reason(tmp_path, header):
    write_raw(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged.*\(.+\): download it again"):
        Checkpoint(tmp_path)


def test_a_header_length_beyond_the_format_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint(tmp_path)


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Checkpoint(tmp_path)


def test_dtypes_that_torch_lacks_are_refused_only_when_asked_for(tmp_path):
    write_raw(tmp_path / "model.safetensors", {"w": entry("F6_E2M3", [4], [0, 3])}, bytes(3))
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="tensor w cannot be read"):
        checkpoint.tensor("w")


def test_a_file_that_changes_between_header_and_data_is_noticed(tmp_path):
    path = write(tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="has changed"):
        checkpoint.tensor("w")


def test_a_file_that_was_replaced_by_one_of_the_same_size_is_noticed(tmp_path):
    path = write(tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    os.utime(write(tmp_path / "other", w=TENSOR + 1), ns=(0, 1))
    (tmp_path / "other").rename(path)
    with pytest.raises(CheckpointError, match="has changed while it was being read: load the model again"):
        checkpoint.tensor("w")


def test_a_file_that_was_deleted_is_named(tmp_path):
    path = write(tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: No such file"):
        checkpoint.tensor("w")
    with Checkpoint(write(tmp_path / "folder" / "model.safetensors").parent) as other:
        other.read_ahead("nothing")
        (tmp_path / "folder" / "model.safetensors").unlink()
        other.read_ahead("w")  # a hint: it fails quietly


# Several tensors at once


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["U8", "F16", "I32", "F64"]), st.integers(0, 40), st.integers(0, 3)), min_size=1
    ),
    st.integers(1, 64),
)
def test_tensors_that_are_read_at_once_are_those_that_are_read_alone(tmp_path_factory, parts, gap):
    """parts: (dtype, elements, what lies before it that nobody asks for, in pieces of `gap` bytes)."""
    sizes = {"U8": 1, "F16": 2, "I32": 4, "F64": 8}
    header, end = {}, 0
    for number, (dtype, count, between) in enumerate(parts):
        for skipped in range(between):
            header[f"other {number} {skipped}"] = entry("U8", (gap,), (end, end + gap))
            end += gap
        header[f"w{number}"] = entry(dtype, (count,), (end, end + count * sizes[dtype]))
        end += count * sizes[dtype]
    data = bytes(byte % 251 for byte in range(end))
    path = write_raw(tmp_path_factory.mktemp("at-once") / "model.safetensors", header, data)
    file = SafetensorsFile(path)
    wanted = [f"w{number}" for number in range(len(parts))]
    with mock.patch("ropewalk.files.safetensors.GAP_BYTES", 2 * gap):
        found = file.tensors_at_once(wanted)
    assert sorted(found) == sorted(wanted)
    for name in wanted:
        alone = file.tensor(name)
        assert found[name].dtype == alone.dtype and found[name].shape == alone.shape
        assert torch.equal(found[name].view(torch.uint8), alone.view(torch.uint8))


def test_modules_at_hand_are_read_once_and_only_for_their_thread(tmp_path):
    tensors = {"a.x": TENSOR, "a.y": TENSOR + 1, "b.x": TENSOR + 2, "c.x": TENSOR + 3}
    path = write(tmp_path / "model.safetensors", **tensors)
    with Checkpoint(tmp_path) as checkpoint, ThreadPoolExecutor(1) as other:
        read = mock.Mock(wraps=SafetensorsFile._read)
        with mock.patch.object(SafetensorsFile, "_read", lambda *args: read(*args)):
            with checkpoint.at_hand(["a", "b", "nothing"]):
                assert read.call_count == 1
                assert all(torch.equal(checkpoint.tensor(name), tensors[name]) for name in ("a.x", "a.y", "b.x"))
                assert read.call_count == 1
                assert torch.equal(checkpoint.tensor("a.x"), TENSOR)  # again: in memory of its own
                assert torch.equal(other.submit(checkpoint.tensor, "b.x").result(), TENSOR + 2)
                assert read.call_count == 3
            checkpoint.tensor("b.x")
            assert read.call_count == 4
        write(path, **(tensors | {"a.x": TENSOR.double()}))
        with pytest.raises(CheckpointError, match="has changed"), checkpoint.at_hand(["a"]):
            pass


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_files_are_read_in_full_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("mutated")
    path = write(folder / "model.safetensors", a=TENSOR, b=TENSOR.half(), c=TENSOR.int())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        file = SafetensorsFile(path)
        for name, info in file.tensors.items():
            assert tuple(file.tensor(name).shape) == info.shape
    except CheckpointError as error:
        assert "model.safetensors" in str(error)
