"""LoRAs that take the first embedded model to four times its context, each trained under one RoPE scaling.

As kaiokendev's SuperHOT did for Llama with linear scaling and bhenrym14's Airophin with NTK-by-parts: the weights stay
as they are, and low-rank changes of q, k, v and o learn to read the scaled positions. The base is the quantised model
with exactly dequantised weights, because that is what the LoRAs run on, and the frequencies are those of the engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import sentencepiece
import torch
from transformers import LlamaForCausalLM

import ropewalk
from corpus import Document
from first.evaluate import quantised_model
from first.training import BOS_ID, CONTEXT, EOS_ID, TrainingPlan, held_out_loss, run_steps

FACTOR = 4
LENGTH = FACTOR * CONTEXT
RANK, ALPHA = 16, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class Variant:
    """One LoRA: the name of its folder, and the RoPE scaling that it is trained under, as its note will say.

    pieces: steps cut their windows into so many pieces, in turn; a piece is a context of its own.
    """

    name: str
    rope_scaling: Mapping[str, Any]
    pieces: tuple[int, ...] = (1,)


LINEAR = {"rope_type": "linear", "factor": float(FACTOR), "original_max_position_embeddings": CONTEXT}
NTK = {"rope_type": "ntk", "factor": float(FACTOR), "original_max_position_embeddings": CONTEXT}
BY_PARTS = {"rope_type": "ntk-by-parts", "factor": float(FACTOR), "original_max_position_embeddings": CONTEXT}
DYNAMIC = {"rope_type": "dynamic", "factor": 1.0, "original_max_position_embeddings": CONTEXT}
YARN = {"rope_type": "yarn", "factor": float(FACTOR), "original_max_position_embeddings": CONTEXT}
VARIANTS = (
    Variant("linear-4", LINEAR),
    Variant("ntk-by-parts-4", BY_PARTS),
    Variant("extrapolation", {"rope_type": "default"}),
    Variant("yarn-4", YARN),
    Variant("ntk-4", NTK),
    # Windows of 2,048 have the frequencies of NTK 4: with them alone this would be the same LoRA once more.
    Variant("dynamic-ntk", DYNAMIC, pieces=(4, 2, 1)),
)


def long_windows(
    tokenizer: sentencepiece.SentencePieceProcessor, documents: list[Document], length: int, seed: int
) -> np.ndarray:
    """uint16 [windows, length + 1]: pieces of single documents, shuffled. Documents that are shorter are left out.

    No window holds parts of two documents, so that whatever lies far back may matter. Library documents come twice,
    each time cut at another offset, and tests once, as in the training of the model.
    """
    generator = np.random.default_rng(seed)
    windows = []
    for document in documents:
        ids = np.asarray([BOS_ID, *tokenizer.encode(document.text), EOS_ID], dtype=np.uint16)
        spare = (len(ids) - 1) % length
        for _ in range(1 if document.is_test else 2):
            offset = int(generator.integers(spare + 1))
            starts = range(offset, len(ids) - length, length)
            windows += [ids[start : start + length + 1] for start in starts]
    return np.stack(windows)[generator.permutation(len(windows))]


def batches(windows: np.ndarray, batch: int, first_step: int, pieces: Sequence[int] = (1,)) -> Iterator[torch.Tensor]:
    """int64 [batch * P, length / P + 1] in the order of `windows`, from a step on; the text begins anew where it ends.

    windows: [windows, length + 1]. pieces: P of each step in turn, divisors of the length; any P predicts the same
    tokens.
    """
    whole, step = windows.shape[1] - 1, first_step
    while True:
        rows = np.arange(step * batch, (step + 1) * batch) % len(windows)
        length = whole // pieces[step % len(pieces)]
        places = np.arange(0, whole, length)[:, None] + np.arange(length + 1)  # [P, length + 1]
        cut = windows[rows][:, places].reshape(-1, length + 1)  # [batch * P, length + 1]
        yield torch.from_numpy(cut.astype(np.int64))
        step += 1


def scaled_model(folder: Path, rope_scaling: Mapping[str, Any]) -> LlamaForCausalLM:
    """The dequantised model of `folder` in transformers, with the RoPE frequencies that the engine would use.

    They are those for a prompt as long as the window at hand: under dynamic NTK each length has its own.
    """
    model = quantised_model(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = ropewalk.resolve_rope(config, rope_scaling=rope_scaling)

    def follow(rotary: torch.nn.Module, _: tuple[Any, ...], options: dict[str, Any]) -> None:
        frequencies, scale = rope.inverse_frequencies(options["position_ids"].shape[-1])
        rotary.inv_freq = torch.tensor(frequencies, dtype=torch.float32)
        rotary.attention_scaling = scale

    model.model.rotary_emb.register_forward_pre_hook(follow, with_kwargs=True)
    return model


def train_adapter(
    folder: Path, variant: Variant, windows: np.ndarray, held_out: np.ndarray, plan: TrainingPlan, work: Path
) -> tuple[peft.PeftModel, dict[str, float]]:
    """Train the LoRA of a variant on the model in `folder`, or continue from the checkpoint in `work`.

    windows: [windows, plan.length + 1]; held_out: [tokens], for the log alone.
    """
    torch.manual_seed(plan.seed)
    torch.set_num_threads(plan.threads)
    base = scaled_model(folder, variant.rope_scaling)
    base.set_attn_implementation("sdpa")  # as fast at this length as the compiled eager one, with nothing to compile
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "peak_lr": plan.vector_lr}]
    numbers = run_steps(
        model,
        [torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)],
        lambda first_step: batches(windows, plan.batch, first_step, variant.pieces),
        plan,
        work / f"{variant.name}.pt",
        lambda: held_out_loss(model, held_out, plan.length),
    )
    return model, numbers


def save_adapter(model: peft.PeftModel, variant: Variant, folder: Path) -> None:
    """Write the LoRA as PEFT does, in float16, with the RoPE scaling noted in its adapter_config.json."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"rope_scaling": dict(variant.rope_scaling), "target_modules": sorted(config["target_modules"])}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
