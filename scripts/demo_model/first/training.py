"""Tokenizer and training of the first embedded model: sentencepiece BPE, then a small Llama in plain torch.

Hidden matrices are trained with Muon and the rest with AdamW. On two cores of one CPU the matrix products of bf16
autocast take less than half of a step, so the model is shallow and wide rather than deep: attention at 512 tokens costs
as much per layer as the layer's weights.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from corpus import Document
from pieces import BOS_ID, EOS_ID, train_pieces

LOGGER = logging.getLogger(__name__)

VOCAB_SIZE = 4096
CONTEXT = 512
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "legacy": False,
    "model_max_length": CONTEXT,
}


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How long and how fast: training ends at `total_tokens` or after `minutes`, whichever comes first."""

    total_tokens: int
    minutes: float
    seed: int
    batch: int
    threads: int
    compiled: bool
    matrix_lr: float = 6e-3
    vector_lr: float = 4e-3
    warmup: float = 0.02
    checkpoint_every: int = 250
    log_every: int = 50
    length: int = CONTEXT

    @property
    def tokens_per_step(self) -> int:
        """Tokens that are predicted in one step."""
        return self.batch * self.length


def model_config() -> LlamaConfig:
    """The shape: 5.0 million parameters, of which 1.0 million are the (tied) embeddings."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=None,
        use_cache=True,
    )


def train_tokenizer(documents: list[Document]) -> bytes:
    """A sentencepiece model proto, learned from the lines of the library documents."""
    lines = (line for document in documents if not document.is_test for line in document.text.split("\n"))
    return train_pieces(lines, VOCAB_SIZE)


def write_tokenizer(proto: bytes, folder: Path) -> None:
    """tokenizer.model, the only source of the tokens, and the tokenizer_config.json that says how to use it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(proto)
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n", encoding="utf-8")


def encode_documents(tokenizer: sentencepiece.SentencePieceProcessor, documents: list[Document]) -> np.ndarray:
    """uint16 [tokens]: every document as <s> text </s>, one after the other."""
    ids = [[BOS_ID, *tokenizer.encode(document.text), EOS_ID] for document in documents]
    return np.concatenate([np.asarray(piece, dtype=np.uint16) for piece in ids])


def training_stream(
    tokenizer: sentencepiece.SentencePieceProcessor, documents: list[Document], seed: int
) -> np.ndarray:
    """uint16 [tokens]: one epoch, shuffled by document; library documents come twice, tests once.

    Tests are two thirds of the text and far more repetitive than the library.
    """
    chosen = documents + [document for document in documents if not document.is_test]
    order = np.random.default_rng(seed).permutation(len(chosen))
    return encode_documents(tokenizer, [chosen[i] for i in order])


def batches(stream: np.ndarray, plan: TrainingPlan, first_step: int) -> Iterator[torch.Tensor]:
    """int64 [batch, CONTEXT + 1] from step `first_step` on: each epoch cuts the stream at another offset."""
    per_epoch = (len(stream) - 2 * CONTEXT) // CONTEXT // plan.batch
    step = first_step
    while True:
        epoch, position = divmod(step, per_epoch)
        generator = np.random.default_rng((plan.seed, epoch))
        offset = int(generator.integers(CONTEXT))
        windows = generator.permutation(per_epoch * plan.batch)
        for index in range(position, per_epoch):
            starts = windows[index * plan.batch : (index + 1) * plan.batch] * CONTEXT + offset
            rows = np.stack([stream[start : start + CONTEXT + 1] for start in starts])
            yield torch.from_numpy(rows.astype(np.int64))
            step += 1


def train(stream: np.ndarray, held_out: np.ndarray, plan: TrainingPlan, folder: Path) -> dict[str, float]:
    """Train, or continue from `folder`/checkpoint.pt; save the model under `folder`/float and return its numbers."""
    torch.manual_seed(plan.seed)
    torch.set_num_threads(plan.threads)
    model = LlamaForCausalLM(model_config()).train()
    # Plain matrix products and softmax: two thirds of the time of torch's fused attention in bf16 on a CPU (2.13).
    model.set_attn_implementation("eager")
    numbers = run_steps(
        model,
        _optimizers(model, plan),
        lambda first_step: batches(stream, plan, first_step),
        plan,
        folder / "checkpoint.pt",
        lambda: held_out_loss(model, held_out, plan.length),
    )
    model.save_pretrained(folder / "float")
    return numbers


def run_steps(
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batches_from: Callable[[int], Iterator[torch.Tensor]],
    plan: TrainingPlan,
    checkpoint: Path,
    measured_loss: Callable[[], float],
) -> dict[str, float]:
    """Run the steps of a plan, continuing from `checkpoint` if there is one. Returns steps, tokens and minutes.

    batches_from: the batches [plan.batch, plan.length + 1] int64 from a step on. Parameter groups hold their "peak_lr".
    measured_loss: called now and then for the log.
    """
    step, elapsed_before = _restore(checkpoint, model, optimizers)
    loss_of = torch.compile(_loss, dynamic=False) if plan.compiled else _loss
    started, smooth = time.monotonic(), None
    for batch in batches_from(step):
        elapsed = elapsed_before + time.monotonic() - started
        progress = max(step * plan.tokens_per_step / plan.total_tokens, elapsed / (60 * plan.minutes))
        if progress >= 1:
            break
        loss = _step(model, optimizers, loss_of, batch, _lr_factor(progress, plan.warmup))
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        step += 1
        if step % plan.log_every == 0:
            rate = plan.tokens_per_step * step / (elapsed + 1e-9)
            LOGGER.info("step %d, %.0f %%, loss %.3f, %.0f tokens/s", step, 100 * progress, smooth, rate)
        if step % plan.checkpoint_every == 0:
            LOGGER.info("held-out loss %.4f", measured_loss())
            _save(checkpoint, model, optimizers, step, elapsed)
    elapsed = elapsed_before + time.monotonic() - started
    return {"steps": step, "tokens": step * plan.tokens_per_step, "minutes": elapsed / 60}


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, held_out: np.ndarray, length: int, num_tokens: int = 32 * CONTEXT) -> float:
    """Mean loss over windows of `length` spread over held_out [tokens]."""
    rows = num_tokens // length
    starts = np.linspace(0, len(held_out) - length - 1, rows).astype(int)
    batch = torch.from_numpy(np.stack([held_out[s : s + length + 1] for s in starts]).astype(np.int64))
    return sum(_loss(model, row[None]).item() for row in batch) / rows


def _loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # [batch, length, V]
    return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def _step(model, optimizers, loss_of, batch: torch.Tensor, lr_factor: float) -> float:
    loss = loss_of(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _optimizers(model: LlamaForCausalLM, plan: TrainingPlan) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024; update scale of Liu et al. 2025, arXiv:2502.16982) for the layers' matrices, else AdamW."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(
        [{"params": matrices, "peak_lr": plan.matrix_lr}], weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([{"params": others, "peak_lr": plan.vector_lr}], betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def _lr_factor(progress: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` of the run, then a cosine down to 1 % of the peak."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _restore(path: Path, model: torch.nn.Module, optimizers) -> tuple[int, float]:
    """(step, seconds trained) of the checkpoint, loaded into model and optimizers; (0, 0) if there is none."""
    if not path.is_file():
        return 0, 0.0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return saved["step"], saved["elapsed"]


def _save(path: Path, model: torch.nn.Module, optimizers, step: int, elapsed: float) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    partial = path.with_suffix(".partial")
    torch.save({"model": model.state_dict(), "optimizers": states, "step": step, "elapsed": elapsed}, partial)
    partial.replace(path)
