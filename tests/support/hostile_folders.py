"""A corpus of damaged model folders, the same for the same seed.

A case is a whole checkpoint (a copy out of tests/data, or one that gptq_writer or transformers makes) and one kind of
damage done to it. `make_case(number, seed, folder)` cycles through the kinds, so that any run of `len(KINDS)` numbers
has them all; what exactly is damaged, and how, comes from a generator seeded with both numbers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from container_writer import write_container
from fixtures import LOCAL_DATA
from gptq_writer import Kind, write_checkpoint

Damage = Callable[[Path, np.random.Generator], None]
KINDS: dict[str, Damage] = {}

TOKENIZER_SOURCE = LOCAL_DATA / "gptq" / "g2-32-act-asym-v2"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")

# Checkpoints of kinds that tests/data does not hold: arguments of write_checkpoint.
WRITTEN: dict[str, dict[str, Any]] = {
    "8 bits, zero biases": {"bits": 8, "bias": "zero"},
    "4 bits, act-order, asymmetric": {"desc_act": True, "sym": False, "bias": "random"},
    "planar 5 bits": {"bits": 5, "format": "gptq_p"},
    "era 0, undeclared": {"era": 0, "group_size": -1, "config_files": ()},
    "era 1, undeclared": {"era": 1, "config_files": ()},
    "shards": {"shards": 3, "desc_act": True},
    "dense qwen3": {"dense": True, "family": "qwen3", "dtype": torch.bfloat16},
    "quantised lm_head": {"quantised_lm_head": True, "config_files": ("quantize_config.json",)},
    "skipped modules": {"dynamic": {r"-:.*down_proj": {}, r".*q_proj": {"bits": 8}}},
    "odd name": {"file_name": "4bit-32g.safetensors", "config_files": ("config.json", "quantize_config.json")},
}

# Families that write_checkpoint does not know, as transformers saves them: settings beside those of their_folder.py.
SAVED: dict[str, dict[str, Any]] = {
    "gemma3_text": {"head_dim": 16, "sliding_window": 24},
    "phi3": {"tie_word_embeddings": True},
    "cohere": {"use_qk_norm": True},
    "stablelm": {"qk_layernorm": True},
    "gpt_neox": {},
    "starcoder2": {},
}

# And in other containers: arguments of write_container.
CONTAINERS: dict[str, tuple[str, Kind]] = {
    "AWQ": ("awq", Kind(sym=False)),
    "W4A16 with the order of groups": ("compressed-tensors", Kind(desc_act=True)),
    "W4A16, asymmetric": ("compressed-tensors", Kind(sym=False)),
    "W4A16, asymmetric, of 2024": ("compressed-tensors", Kind(sym=False, era=3)),
    "W8A16": ("compressed-tensors", Kind(bits=8, group_size=-1)),
}

# What a JSON value is replaced with. Python's reader takes NaN and Infinity, so they are in.
ABSURD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 7, 2**20, 2**31, 2**63, -(2**64), 10**4000),
    *(0.5, -0.5, 1e308, 1e-308, float("nan"), float("inf"), "", "abc", "4", "model.layers.0", "a/../b\n\0", "é▁\u2028"),
    *("\ud800", "x" * 100_000, [], [None], [1, 2, 3], [[[]]], {}, {"": None}, {"factor": "x"}, list(range(5000))),
)


def make_case(number: int, seed: int, folder: Path) -> str:
    """Write case `number` into the new folder `folder`; returns the kind of damage."""
    rng = np.random.default_rng([seed, number])
    kind = list(KINDS)[number % len(KINDS)]
    write_base(folder, int(rng.integers(2**31)))
    KINDS[kind](folder, rng)
    return kind


def write_base(folder: Path, choice: int) -> None:
    """An undamaged checkpoint with a tokenizer: one of tests/data or one of WRITTEN."""
    copied = sorted(path for path in (LOCAL_DATA / "gptq").iterdir() if path.is_dir())
    choice %= len(copied) + len(WRITTEN) + len(SAVED) + len(CONTAINERS)
    if choice < len(copied):
        ignored = shutil.ignore_patterns("expected.npz", "fixture.json")
        shutil.copytree(copied[choice], folder, ignore=ignored)
        return
    choice -= len(copied)
    if choice < len(WRITTEN):
        write_checkpoint(folder, {"vocab_size": 512}, **WRITTEN[list(WRITTEN)[choice]])
    elif choice < len(WRITTEN) + len(SAVED):
        shutil.copytree(_saved(list(SAVED)[choice - len(WRITTEN)]).name, folder)
    else:
        container, kind = list(CONTAINERS.values())[choice - len(WRITTEN) - len(SAVED)]
        write_container(folder, container, kind, {"vocab_size": 512})
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER_SOURCE / name, folder / name)


@cache
def _saved(family: str) -> TemporaryDirectory[str]:
    """A folder that is made once and copied for each case."""
    from their_folder import quantise_model, save_model  # not at the top: transformers takes seconds to import

    made = TemporaryDirectory()
    save_model(Path(made.name), family, vocab_size=512, **SAVED[family])
    quantise_model(Path(made.name))
    return made


def damage(kind: str) -> Callable[[Damage], Damage]:
    """Register a kind of damage under its name."""

    def register(function: Damage) -> Damage:
        KINDS[kind] = function
        return function

    return register


def pick(rng: np.random.Generator, values: Any) -> Any:
    values = list(values)
    return values[int(rng.integers(len(values)))]


def weight_file(folder: Path, rng: np.random.Generator) -> Path:
    return pick(rng, sorted(folder.glob("*.safetensors")))


def json_file(folder: Path, rng: np.random.Generator) -> Path:
    return pick(rng, sorted(folder.glob("*config*.json")) + sorted(folder.glob("*.index.json")))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def places(value: Any, depth: int = 6) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value down to `depth`; long lists and objects by their first entries."""
    if depth == 0 or not isinstance(value, (dict, list)):
        return []
    keys = list(value)[:40] if isinstance(value, dict) else range(min(len(value), 10))
    own = [(value, key) for key in keys]
    return own + [place for key in keys for place in places(value[key], depth - 1)]


def spoil_json(path: Path, rng: np.random.Generator) -> None:
    """Replace, remove or add something anywhere in a JSON file."""
    document = json.loads(path.read_text())
    container, key = pick(rng, places(document))
    action = int(rng.integers(4))
    if action == 0:
        del container[key]
    elif action == 1 and isinstance(container, dict):
        container[str(pick(rng, ABSURD))] = container[key]
    else:
        container[key] = pick(rng, ABSURD)
    path.write_text(json.dumps(document))


def spoil_bytes(path: Path, rng: np.random.Generator, first: int = 0, last: int | None = None) -> None:
    """Flip single bits, overwrite a run with noise, or cut a run out, within bytes first..last of a file."""
    data = bytearray(path.read_bytes())
    last = len(data) if last is None else last
    action = int(rng.integers(3))
    if action == 0:
        for at in rng.integers(first, last, int(rng.integers(1, 40))):
            data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        return
    begin = int(rng.integers(first, last))
    end = min(last, begin + int(rng.integers(1, 64)))
    data[begin:end] = rng.bytes(end - begin) if action == 1 else b""
    path.write_bytes(data)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def tensor_names(tensors: dict[str, torch.Tensor], *endings: str) -> list[str]:
    """Those with one of these endings; all of them where there are none."""
    return [name for name in tensors if name.endswith(endings)] or list(tensors)


def replace_file(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def symlink_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


FILE_REPLACEMENTS: tuple[Callable[[Path], object], ...] = (
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    lambda path: path.mkdir(),
    os.mkfifo,
    symlink_to("nowhere"),
    symlink_to("/dev/zero"),
    symlink_to("/dev/null"),
    lambda path: path.symlink_to(path.name),
)
