"""Make the first embedded model from scratch: text, tokenizer, training, GPTQ, evaluation, model card.

Every stage reads what the earlier ones left in the work folder, so they can run one by one, also under different
interpreters. `quantize` needs gptqmodel, which asks for its own virtual environment:

    python -m venv gptq-venv
    gptq-venv/bin/pip install "torch==2.13.0" transformers sentencepiece protobuf accelerate datasets defuser \\
        device-smi dill logbar ninja pillow pyarrow pypcre requests threadpoolctl tokenicer torchao
    gptq-venv/bin/pip install --no-deps "gptqmodel==7.7.0"
    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
    python -m first.make --stage corpus,tokenizer,train
    GPTQMODEL_CPU_WORKERS=2 gptq-venv/bin/python -m first.make --stage quantize
    python -m first.make --stage evaluate,card

The two MALLOC settings keep glibc from returning every activation to the system, which took 40 % of the training time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from pathlib import Path

import corpus
from corpus import Document

WORK = Path(__file__).resolve().parents[3] / ".cache" / "demo_model"
CALIBRATION_ROWS = 256
PROMPT = "def read_lines(path):\n"
STAGES = ("corpus", "tokenizer", "train", "quantize", "evaluate", "card")


def main() -> None:
    options = parse_options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if stage in options.stage:
            logging.info("stage %s", stage)
            globals()[f"stage_{stage}"](options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", default=",".join(STAGES), type=_stages, help="comma-separated, of: %(default)s")
    parser.add_argument("--work", type=Path, default=WORK, help="work folder")
    parser.add_argument("--out", type=Path, default=WORK / "model", help="folder of the model")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="training tokens")
    parser.add_argument("--minutes", type=float, default=120.0, help="training ends earlier after this time")
    parser.add_argument("--batch", type=int, default=16, help="windows of 512 tokens per step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--note", default="", help="a sentence for the model card on how the training went")
    parser.add_argument(
        "--no-compile", action="store_true", help="train without torch.compile (no C++ compiler needed)"
    )
    return parser.parse_args()


def stage_corpus(options: argparse.Namespace) -> None:
    """documents.json (all text) and manifest.json (what it is, which files are held out)."""
    documents = corpus.collect_documents()
    learned, held_out = corpus.split_documents(documents)
    digest = hashlib.sha256("\0".join(document.text for document in learned).encode("utf-8")).hexdigest()
    manifest = {
        "python": corpus.python_version(),
        "training_documents": len(learned),
        "training_characters": sum(len(document.text) for document in learned),
        "training_sha256": digest,
        "held_out_characters": sum(len(document.text) for document in held_out),
        "held_out_documents": [document.path for document in held_out],
    }
    _write_json(options.work / "documents.json", [[document.path, document.text] for document in documents])
    _write_json(options.work / "manifest.json", manifest)


def stage_tokenizer(options: argparse.Namespace) -> None:
    """tokenizer.model from the training documents."""
    from first import training

    learned, _ = corpus.split_documents(_documents(options))
    (options.work / "tokenizer.model").write_bytes(training.train_tokenizer(learned))


def stage_train(options: argparse.Namespace) -> None:
    """float/ (the float model) and training.json; continues from checkpoint.pt if there is one."""
    from first import training

    tokenizer = _tokenizer(options)
    learned, held_out = corpus.split_documents(_documents(options))
    plan = training.TrainingPlan(
        total_tokens=options.tokens,
        minutes=options.minutes,
        seed=options.seed,
        batch=options.batch,
        threads=options.threads,
        compiled=not options.no_compile,
    )
    stream = training.training_stream(tokenizer, learned, plan.seed)
    logging.info("%d tokens per epoch", len(stream))
    numbers = training.train(stream, training.encode_documents(tokenizer, held_out), plan, options.work)
    settings = {"epoch_tokens": len(stream), "batch": plan.batch, "seed": plan.seed}
    _write_json(options.work / "training.json", numbers | settings)


def stage_quantize(options: argparse.Namespace) -> None:
    """The GPTQ checkpoint and the tokenizer in the model folder, calibrated on windows of the training text."""
    import numpy as np

    import quantise
    from first import training

    proto = (options.work / "tokenizer.model").read_bytes()
    training.write_tokenizer(proto, options.work / "float")
    learned, _ = corpus.split_documents(_documents(options))
    stream = training.training_stream(_tokenizer(options), learned, options.seed)
    starts = np.random.default_rng(options.seed).integers(0, len(stream) - training.CONTEXT, CALIBRATION_ROWS)
    rows = np.stack([stream[start : start + training.CONTEXT] for start in starts])
    quantise.quantise(options.work / "float", rows, options.out)
    training.write_tokenizer(proto, options.out)


def stage_evaluate(options: argparse.Namespace) -> None:
    """held_out.txt in the model folder, and evaluation.json: perplexities and a sample."""
    import numpy as np
    import torch

    from first import evaluate, training

    torch.set_num_threads(options.threads)
    tokenizer = _tokenizer(options)
    _, held_out = corpus.split_documents(_documents(options))
    text = corpus.held_out_text(held_out)
    (options.out / "held_out.txt").write_bytes(text.encode("utf-8"))
    sample_ids = np.asarray(tokenizer.encode(text))
    all_ids = training.encode_documents(tokenizer, held_out)
    all_bytes = sum(len(document.text.encode("utf-8")) for document in held_out)
    models = {
        "float": evaluate.float_model(options.work / "float"),
        "gptq": evaluate.quantised_model(options.out),
    }
    numbers = {}
    for name, model in models.items():
        numbers[f"{name}_sample"] = evaluate.held_out_numbers(model, sample_ids, len(text.encode("utf-8")))
        numbers[f"{name}_all"] = evaluate.held_out_numbers(model, all_ids, all_bytes)
    written = evaluate.sample(models["gptq"], tokenizer.encode(PROMPT), 300, options.seed)
    numbers |= {
        "sample_files": [document.path for document in corpus.held_out_sample(held_out)],
        "by_length": evaluate.perplexity_by_length(options.out, sample_ids),
        "parameters": sum(parameter.numel() for parameter in models["float"].parameters()),
        "prompt": PROMPT,
        "sample": tokenizer.decode(written),
    }
    _write_json(options.work / "evaluation.json", numbers)


def stage_card(options: argparse.Namespace) -> None:
    """README.md and Python's licence in the model folder."""
    from first import card

    (options.out / "LICENSE-PYTHON.txt").write_text(corpus.licence(_documents(options)), encoding="utf-8")
    parts = [
        json.loads((options.work / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("manifest", "training", "evaluation")
    ]
    size = sum(path.stat().st_size for path in options.out.iterdir() if path.is_file() and path.name != "README.md")
    (options.out / "README.md").write_text(card.model_card(*parts, size, options.note), encoding="utf-8")


def _stages(text: str) -> list[str]:
    stages = text.split(",")
    for stage in stages:
        if stage not in STAGES:
            raise argparse.ArgumentTypeError(f"unknown stage {stage!r}; stages are {', '.join(STAGES)}")
    return stages


def _documents(options: argparse.Namespace) -> list[Document]:
    pairs = json.loads((options.work / "documents.json").read_text(encoding="utf-8"))
    return [Document(path, text) for path, text in pairs]


def _tokenizer(options: argparse.Namespace):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(options.work / "tokenizer.model"))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
