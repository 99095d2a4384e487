"""The bits of every result that the fixtures give, one line each: does a change of the code change a result?

    python scripts/press/fixture_bits.py > before.txt                       # on the tree before the change
    python scripts/press/fixture_bits.py --against before.txt               # on the tree after it, same machine

A line is the SHA-256 of one result and the case that gave it: logits of every checkpoint on every instruction set, in
both compute modes and cache types, read at once and in chunks, with layers repeated, with each adapter of the embedded
model; rotation tables; token ids. Only public names are used, so that the script runs on older trees too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import ropewalk

REPOSITORY = Path(__file__).resolve().parents[2]
EMBEDDED = REPOSITORY / "loader_plugin" / "ropewalk" / "demo_model"
FIXTURES = (REPOSITORY / "tests" / "data", REPOSITORY.parent / "shared" / "fixtures")
TEXT = "def parse(text, *, strict=True):\n        return [word for word in text.split() if word]\n" * 4
CHUNK = 13  # not a multiple of any block size of the kernels
SCALINGS = ({"rope_type": "yarn", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0})


def main() -> int:
    """Print the lines, or compare them; 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="FILE", help="lines of an earlier run to compare with")
    args = parser.parse_args()
    if args.against is None:
        for case, digest in results():
            print(digest, case, flush=True)
        return 0
    before = dict(reversed(line.split(" ", 1)) for line in args.against.read_text().splitlines())
    after = dict(results())
    differing = sorted(case for case in before.keys() & after.keys() if before[case] != after[case])
    for case in differing:
        print("differs:", case)
    for case in sorted(before.keys() ^ after.keys()):
        print("only before:" if case in before else "only after:", case)
    print(f"{len(before.keys() & after.keys())} results compared, {len(differing)} differ")
    return int(bool(differing) or before.keys() != after.keys())


def results() -> Iterator[tuple[str, str]]:
    """(case, SHA-256 of its result) of everything."""
    folders = {path.parent.name: path.parent for root in FIXTURES for path in sorted(root.glob("gptq/*/config.json"))}
    folders["embedded"] = EMBEDDED
    for name, folder in folders.items():
        yield from checkpoint_results(name, folder)
    yield from adapter_results()
    for root in FIXTURES:
        for manifest in sorted(root.glob("rope/manifest.json")):
            yield from rope_results(root.name, json.loads(manifest.read_text())["cases"])


def checkpoint_results(name: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Logits of one checkpoint in every way of computing that this machine has."""
    token_ids = ids_of(folder)
    yield f"{name} token ids", digest(np.asarray(token_ids, dtype=np.int64))
    for isa in ropewalk.native.available_isas():
        for compute in ("exact", "int8"):
            for cache_type in ("fp16", "fp32"):
                model = ropewalk.load_model(folder, isa=isa, compute=compute, cache_type=cache_type)
                case = f"{name} {isa} {compute} {cache_type}"
                yield case, digest(logits(model, token_ids))
    chunked = ropewalk.load_model(folder, max_input_len=CHUNK, threads=1)
    yield f"{name} chunked", digest(logits(chunked, token_ids))
    layers = chunked.config.num_layers
    chunked.set_layer_order([*range(layers), *range(layers)])
    yield f"{name} every layer twice", digest(logits(chunked, token_ids))
    reference = ropewalk.load_model(folder, backend="reference", compute="exact")
    yield f"{name} reference", digest(logits(reference, token_ids))


def adapter_results() -> Iterator[tuple[str, str]]:
    """The embedded model with its adapters, alone and stacked, and under other scalings."""
    token_ids = ids_of(EMBEDDED)
    model = ropewalk.load_model(EMBEDDED)
    names = sorted(path.name for path in (EMBEDDED / "adapters").iterdir())
    for name in names:
        model.load_adapter(EMBEDDED / "adapters" / name, name)
    for request in (*names, f"{names[0]}+{names[1]}:0.5@1-3"):
        yield f"embedded with {request}", digest(logits(model, token_ids, request))
    for scaling in SCALINGS:
        scaled = ropewalk.load_model(EMBEDDED, rope_scaling=scaling, max_seq_len=2048)
        yield f"embedded with {scaling}", digest(logits(scaled, (token_ids * 8)[:700]))


def rope_results(root: str, cases: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """The rotation tables of every configuration and argument that the manifest names."""
    for case in cases:
        config = {"head_dim": 128, "max_position_embeddings": 2048, "rope_theta": float(case["base"])}
        rope = ropewalk.resolve_rope(case.get("config", config), **case.get("exllama", {}))
        for length in (2048, 16384):
            tables = rope.rotation_tables(length - 64, length, length)
            yield f"rope {root} {case['id']} at {length}", digest(np.stack(tables))


def ids_of(folder: Path) -> list[int]:
    """The prompt that comes with a fixture, else that of TEXT."""
    expected = folder / "expected.npz"
    if expected.is_file():
        with np.load(expected) as arrays:
            return arrays["input_ids"].tolist()
    return ropewalk.load_tokenizer(folder).encode(TEXT)


def logits(model: object, token_ids: list[int], adapters: str | None = None) -> np.ndarray:
    """[T, V] float32."""
    return model.forward(token_ids, model.new_cache(), logits="all", adapters=adapters).numpy()


def digest(array: np.ndarray) -> str:
    """SHA-256 of the bytes, the dtype and the shape."""
    head = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
