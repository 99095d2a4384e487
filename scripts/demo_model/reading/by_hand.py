"""Answers to texts that were written by hand, in words and with names that no grammar of ours made.

    python -m reading.by_hand [MODEL_FOLDER] [--adapter FOLDER]

(in scripts/demo_model). An answer counts if it is one of those in by_hand.txt; its case and a full stop at its end do
not matter.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import ropewalk
from reading.evaluate import adapter_scaling
from ropewalk.files.embedded import demo_model_path

TEXTS = Path(__file__).parent / "by_hand.txt"
GREEDY = ropewalk.SamplingParams(temperature=0.0, max_new_tokens=40)


@dataclass(frozen=True, slots=True)
class Answered:
    """A question, the answers that count, and what the model wrote."""

    question: str
    accepted: tuple[str, ...]
    written: str

    @property
    def right(self) -> bool:
        """Whether what was written is one of the answers that count."""
        return _plain(self.written) in map(_plain, self.accepted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="model folder (default: the embedded model)")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA; its RoPE scaling is taken with it")
    parser.add_argument("--json", type=Path, help="file for the answers")
    options = parser.parse_args()
    answers = ask_all(options.model or demo_model_path(), options.adapter)
    for answered in answers:
        print(f"{'right' if answered.right else 'WRONG'}  {answered.question}  {answered.written}")
    print(f"{sum(answered.right for answered in answers)} of {len(answers)} right")
    if options.json is not None:
        values = [asdict(answered) | {"right": answered.right} for answered in answers]
        options.json.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def counts(folder: Path, adapter: Path | None) -> dict[str, int]:
    """How many questions there are, and how many answers are right."""
    answers = ask_all(folder, adapter)
    return {"right": sum(answered.right for answered in answers), "questions": len(answers)}


def ask_all(folder: Path, adapter: Path | None) -> list[Answered]:
    """Every question of the file, each alone with its text, in the model's own chat template."""
    model = ropewalk.load_model(folder, rope_scaling=adapter_scaling(adapter))
    if adapter is not None:
        model.load_adapter(adapter, adapter.name)
    engine = ropewalk.Engine(model, ropewalk.load_tokenizer(folder))
    answers = []
    for text, questions in read_texts(TEXTS.read_text(encoding="utf-8")):
        for question, accepted in questions:
            messages = [{"role": "user", "content": f"{text}\n\n{question}"}]
            written = "".join(engine.chat(messages, GREEDY, adapters=adapter.name if adapter else None))
            answers.append(Answered(question, accepted, written.strip()))
    return answers


def read_texts(source: str) -> list[tuple[str, list[tuple[str, tuple[str, ...]]]]]:
    """(text, its questions with the answers that count) from the form that the head of by_hand.txt describes."""
    texts = []
    for block in source.split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        if not lines:
            continue
        text = " ".join(line for line in lines if line[0] not in "?=")
        asked = [line[2:] for line in lines if line[0] == "?"]
        accepted = [tuple(part.strip() for part in line[2:].split("|")) for line in lines if line[0] == "="]
        texts.append((text, list(zip(asked, accepted, strict=True))))
    return texts


def _plain(answer: str) -> str:
    return answer.strip().rstrip(".").casefold()


if __name__ == "__main__":
    main()
