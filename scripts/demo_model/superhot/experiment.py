"""The SuperHOT experiment on the first embedded model: does a LoRA trained under scaled positions read further?

LoRAs are trained at four times the trained length (training.py): under linear scaling, NTK-aware scaling,
dynamic NTK, NTK-by-parts and YaRN, and without scaling. Then the perplexity of held_out.txt is measured by context
length and by position, through the engine, with and without them. Stages, each of which reads what the earlier ones
left:

    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
    python -m first.make
    python -m superhot.experiment                    # train, evaluate, report
    python -m superhot.experiment --stage evaluate,report
    python -m superhot.experiment --only ntk-4       # one LoRA; the other curves stay as they are

`train` continues from a checkpoint if there is one, `evaluate` after the last window. To make weights or LoRAs anew,
first remove superhot/ and superhot_perplexity.json from the work folder. `train` needs peft and transformers (the
extra `test`), `report` needs matplotlib (the extra `plots`). The MALLOC settings are those of first/make.py.
All commands run in scripts/demo_model.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from corpus import Document, split_documents
from first.make import WORK

REPOSITORY = Path(__file__).resolve().parents[3]
DOCS = REPOSITORY / "docs"
STAGES = ("train", "evaluate", "report")


def main() -> None:
    options = parse_options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for stage in options.stage:
        logging.info("stage %s", stage)
        {"train": stage_train, "evaluate": stage_evaluate, "report": stage_report}[stage](options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", default=",".join(STAGES), type=_stages, help="comma-separated, of: %(default)s")
    parser.add_argument("--work", type=Path, default=WORK, help="work folder")
    parser.add_argument(
        "--model", type=Path, default=WORK / "model", help="the GPTQ model; LoRAs go to its folder adapters"
    )
    parser.add_argument("--only", metavar="NAME", help="train and evaluate this LoRA alone, such as linear-4")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the table and the plot go")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="training tokens of each LoRA")
    parser.add_argument("--minutes", type=float, default=60.0, help="a training ends earlier after this time")
    parser.add_argument("--batch", type=int, default=2, help="windows of 2,048 tokens per step")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def stage_train(options: argparse.Namespace) -> None:
    """adapters/NAME/ of every variant in the model folder, and training_NAME.json in the work folder."""
    import sentencepiece

    from first import training
    from superhot import training as superhot

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(options.model / "tokenizer.model"))
    learned, held_out = split_documents(_documents(options.work))
    windows = superhot.long_windows(tokenizer, learned, superhot.LENGTH, options.seed)
    held_out_ids = training.encode_documents(tokenizer, held_out)
    plan = training.TrainingPlan(
        total_tokens=options.tokens,
        minutes=options.minutes,
        seed=options.seed,
        batch=options.batch,
        threads=options.threads,
        compiled=False,
        vector_lr=options.lr,
        warmup=0.05,
        checkpoint_every=50,
        log_every=25,
        length=superhot.LENGTH,
    )
    work = options.work / "superhot"
    work.mkdir(parents=True, exist_ok=True)
    _check_name(options.only)
    for variant in (variant for variant in superhot.VARIANTS if options.only in (None, variant.name)):
        logging.info("LoRA %s", variant.name)
        model, numbers = superhot.train_adapter(options.model, variant, windows, held_out_ids, plan, work)
        superhot.save_adapter(model, variant, options.model / "adapters" / variant.name)
        facts = numbers | {"windows": len(windows), "batch": options.batch, "lr": options.lr, "seed": options.seed}
        _write_json(work / f"training_{variant.name}.json", facts)


def stage_evaluate(options: argparse.Namespace) -> None:
    """context-extension.csv and context-positions.csv: perplexity by length and by position, through the engine."""
    from superhot import curves

    _check_name(options.only)
    options.work.mkdir(parents=True, exist_ok=True)
    chosen = [curve for curve in curves.CURVES if options.only in (None, curve.adapter)]
    by_length, by_place = curves.measure(options.model, options.work / "superhot_perplexity.json", chosen)
    for points, name, place in ((by_length, "extension", "length"), (by_place, "positions", "position")):
        path = options.docs / f"context-{name}.csv"
        kept = curves.read_csv(path) if options.only else []
        curves.write_csv(curves.in_order(kept, points), path, place)


def stage_report(options: argparse.Namespace) -> None:
    """The plots, and the table in context-extension.md, from both CSV files."""
    from superhot import curves, report

    points = curves.read_csv(options.docs / "context-extension.csv")
    report.draw(points, options.docs / "images" / "context-extension.png")
    places = curves.read_csv(options.docs / "context-positions.csv")
    report.draw_positions(places, options.docs / "images" / "context-positions.png")
    report.write_table(points, options.docs / "context-extension.md")


def _check_name(name: str | None) -> None:
    """Raises SystemExit: --only names no LoRA."""
    from superhot import training as superhot

    names = [variant.name for variant in superhot.VARIANTS]
    if name is not None and name not in names:
        raise SystemExit(f"--only {name}: accepted are {', '.join(names)}")


def _documents(work: Path) -> list[Document]:
    path = work / "documents.json"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: python -m first.make --stage corpus writes it")
    return [Document(name, text) for name, text in json.loads(path.read_text(encoding="utf-8"))]


def _stages(text: str) -> list[str]:
    chosen = text.split(",")
    for stage in chosen:
        if stage not in STAGES:
            raise argparse.ArgumentTypeError(f"unknown stage {stage!r}; stages are {', '.join(STAGES)}")
    return [stage for stage in STAGES if stage in chosen]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
