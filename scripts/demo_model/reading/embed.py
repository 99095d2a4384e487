"""Put a trained model in the place of the embedded one: everything that its folder holds, and nothing else.

    python -m reading.embed --run RUN_FOLDER --out ../../loader_plugin/ropewalk/demo_model

(in scripts/demo_model, after `reading.measure`.) The new folder is made beside the old one and takes its place when it
is complete, so no file of the old model is left among those of the new one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import corpus
from pieces import BOS_ID, EOS_ID
from reading.card import model_card
from reading.measure import ADAPTERS, adapter_folder

MODEL_FILES = ("config.json", "quantize_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# A reader is asked for what the text says, not for what could stand there: greedy, unless somebody says otherwise.
GENERATION = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False}
CARD_BEGINS = "# The embedded model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, with what was measured")
    parser.add_argument("--model", type=Path, help="the quantised model (default: gptq in the run's folder)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the embedded model")
    options = parser.parse_args()
    embed(options.run, options.model or options.run / "gptq", options.out)


def embed(run: Path, model: Path, out: Path) -> None:
    """Write the folder `out`, in place of what is there.

    Raises:
        SystemExit: `out` holds something else than an embedded model, or something that belongs into it is missing.
    """
    check_replaceable(out)
    made = out.with_name(f"{out.name}.new")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    for name in MODEL_FILES:
        _copy(model / name, made / name)
    for adapter in ADAPTERS:
        (made / "adapters" / adapter).mkdir(parents=True)
        for name in ADAPTER_FILES:
            _copy(adapter_folder(run, adapter) / name, made / "adapters" / adapter / name)
    (made / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n", encoding="utf-8")
    documents = corpus.collect_documents()
    _, held_out = corpus.split_documents(documents)
    (made / "held_out.txt").write_bytes(corpus.held_out_text(held_out).encode("utf-8"))
    (made / "LICENSE-PYTHON.txt").write_text(corpus.licence(documents), encoding="utf-8")
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    (made / "README.md").write_text(model_card(run, model, size), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    made.rename(out)


def check_replaceable(out: Path) -> None:
    """Raises SystemExit where a folder is there that is not an embedded model's: all of it would go."""
    card = out / "README.md"
    if out.exists() and not (card.is_file() and card.read_text(encoding="utf-8").startswith(CARD_BEGINS)):
        raise SystemExit(
            f"{out} is to be replaced, but is no folder of an embedded model (its README.md would begin with "
            f"{CARD_BEGINS!r}): give that folder, or one that does not exist"
        )


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise SystemExit(f"{source} is missing: it belongs into the embedded model's folder")
    shutil.copyfile(source, target)


if __name__ == "__main__":
    main()
