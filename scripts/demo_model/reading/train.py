"""Train the model that reads, or go on from the run folder's checkpoint. SIGTERM saves and ends.

    python -m reading.train --run RUN_FOLDER [--decay-from TOKENS --decay-tokens TOKENS]

(in scripts/demo_model). The rate warms up, then stays; whenever the hours end, start it again with --decay-from at the
tokens it has reached: it falls to nothing over --decay-tokens, and the run is done. Everything goes to RUN_FOLDER:
tokenizer.model, library.npy, checkpoint.pt every few minutes, log.jsonl.

A finished model can be taken further: a new run that is given --start-from MODEL_FOLDER --start-tokens TOKENS, and
another --seed, begins with its weights, also quantised ones.
"""

from __future__ import annotations

import argparse
import json
import queue
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

import corpus
from quantise import dequantised_state
from reading.curriculum import PHASES, Batch, Phase, make_batch, phase_at
from reading.network import Network, Shape, load_transformers_state
from reading.probe import probe
from reading.vocabulary import Encoder, train_tokenizer

LOG_EVERY, PROBE_EVERY, SAVE_EVERY_S = 50, 500, 300
MATRIX_LR, VECTOR_LR, WARMUP_TOKENS = 4e-3, 3e-3, 200_000
AHEAD = 4
CHOSEN_STEP = 256


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.run.mkdir(parents=True, exist_ok=True)
    if options.start_from is not None and not (options.run / "tokenizer.model").exists():
        shutil.copyfile(options.start_from / "tokenizer.model", options.run / "tokenizer.model")
    encoder, library = vocabulary_and_library(options.run)
    network = network_of(options.start_from)
    Trainer(options, encoder, library, network, optimizers_of(network), PHASES, int(options.start_tokens)).run()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--start-from", type=Path, help="model folder whose weights a new run begins with")
    parser.add_argument("--start-tokens", type=float, default=0, help="tokens that those weights have seen")
    options = parser.parse_args()
    if options.start_from is None and options.start_tokens:
        parser.error("--start-tokens says what the weights of --start-from MODEL_FOLDER have seen: give that too")
    return options


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of a run, of the model or of a LoRA."""
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stop-at", type=float, default=float("inf"), help="tokens after which it ends")
    parser.add_argument("--decay-from", type=float, default=float("inf"), help="tokens after which the rate falls")
    parser.add_argument("--decay-tokens", type=float, default=4e6)


def network_of(folder: Path | None) -> Network:
    """A new network, or one with the weights of the model in a folder."""
    if folder is None:
        return Network(Shape())
    network = Network(Shape.of(folder))
    load_transformers_state(network, dequantised_state(folder))
    return network


def vocabulary_and_library(folder: Path) -> tuple[Encoder, np.ndarray]:
    """The run's tokenizer and the encoded standard library, made when the run begins."""
    proto_path, library_path = folder / "tokenizer.model", folder / "library.npy"
    if not proto_path.exists() or not library_path.exists():
        learned, _ = corpus.split_documents(corpus.collect_documents())
        if not proto_path.exists():
            proto_path.write_bytes(train_tokenizer(learned))
        encoder = Encoder(proto_path.read_bytes())
        np.save(library_path, np.concatenate([encoder.document(document.text) for document in learned]))
    return Encoder(proto_path.read_bytes()), np.load(library_path)


class Trainer:
    """The state of a run and its loop.

    network: hidden states of ids when called, and `logits` of these. The groups of its optimizers have a "peak_lr".
    start_tokens: what the network has seen before the run began.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        encoder: Encoder,
        library: np.ndarray,
        network: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        phases: Sequence[Phase],
        start_tokens: int = 0,
    ) -> None:
        self.options, self.encoder, self.library = options, encoder, library
        self.network, self.optimizers, self.phases = network, optimizers, phases
        self.parameters = list(network.parameters())
        self.pool = ThreadPoolExecutor(options.threads, initializer=torch.set_num_threads, initargs=(1,))
        self.start_tokens = start_tokens
        self.step, self.tokens = 0, start_tokens
        self.stopping = threading.Event()
        self._restore()
        self.tokens_before = self.tokens

    def run(self) -> None:
        """Steps until the end of the schedule or a SIGTERM; saves at the end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stopping.set())
        self._log(event="start", step=self.step, tokens=self.tokens, options=vars(self.options))
        last = min(self.options.stop_at, self.options.decay_from + self.options.decay_tokens)
        saved = time.monotonic()
        losses: list[tuple[float, float]] = []
        with closing(self._batches()) as batches:
            for batch in batches:
                if self.stopping.is_set() or self.tokens >= last:
                    break
                losses.append(self._train_step(batch))
                if self.step % LOG_EVERY == 0:
                    self._log_losses(losses)
                    losses = []
                if self.step % PROBE_EVERY == 0:
                    self._log(step=self.step, tokens=self.tokens, **probe(self.network, self.encoder))
                if time.monotonic() - saved > SAVE_EVERY_S:
                    self._save()
                    saved = time.monotonic()
        self._save()
        self._log(event="end", step=self.step, tokens=self.tokens)

    def _log_losses(self, losses: Sequence[tuple[float, float]]) -> None:
        answers, rest = (float(np.nanmean(column)) for column in zip(*losses, strict=True))
        self._log(
            step=self.step,
            tokens=self.tokens,
            length=phase_at(self.tokens, self.phases).length,
            answer_loss=round(answers, 4),
            rest_loss=round(rest, 4),
            tokens_per_cpu_s=round((self.tokens - self.tokens_before) / time.process_time()),
        )

    def _train_step(self, batch: Batch) -> tuple[float, float]:
        """One step; (mean loss of answer tokens, of the others).

        Each worker takes some of the rows on one thread, so that threads wait for each other once a step and not once
        an operation: on a machine that others use as well, most of the time would be waiting.
        """
        total_weight = batch.weights.sum()
        rows = batch.parts(self.options.threads)
        parts = list(self.pool.map(lambda part: self._gradients(part, total_weight), rows))
        for parameter, *gradients in zip(self.parameters, *(part[0] for part in parts), strict=True):
            parameter.grad = sum(gradients[1:], gradients[0])  # in the order of the rows: the same bits every time
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        factor = self._rate_factor()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        list(self.pool.map(_update, self.optimizers))
        self.step += 1
        self.tokens += batch.weights.numel()
        losses, is_answer = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
        return losses[is_answer].mean().item(), losses[~is_answer].mean().item()

    def _gradients(self, part: Batch, total_weight: torch.Tensor):
        """(gradients of the parameters, losses of the targets that were looked at, whether each is of an answer)."""
        chosen = part.weights.flatten().nonzero().squeeze(1)
        count = len(chosen)
        # Few different sizes: oneDNN keeps what it compiles for each, which was 8 to 20 MB a step without this.
        chosen = functional.pad(chosen, (0, -count % CHOSEN_STEP))
        targets, weights = part.ids[:, 1:].flatten()[chosen], part.weights.flatten()[chosen]
        weights[count:] = 0
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.network(part.ids[:, :-1]).flatten(0, 1)[chosen]
            logits = self.network.logits(hidden)
        each = functional.cross_entropy(logits, targets, reduction="none")
        gradients = torch.autograd.grad((each * weights).sum() / total_weight, self.parameters)
        return gradients, each.detach()[:count], part.is_answer.flatten()[chosen[:count]]

    def _rate_factor(self) -> float:
        """Up over the warm-up, then 1, then down along a line."""
        options = self.options
        if self.tokens >= options.decay_from:
            return max(1 - (self.tokens - options.decay_from) / options.decay_tokens, 0.01)
        return max(min(1.0, (self.tokens - self.start_tokens) / WARMUP_TOKENS), 0.01)

    def _batches(self):
        """Batches from the current step on, made ahead by a thread."""
        ready: queue.Queue[Batch] = queue.Queue(AHEAD)

        def produce(step: int, tokens: int) -> None:
            while not self.stopping.is_set():
                phase = phase_at(tokens, self.phases)
                batch = make_batch(phase, self.encoder, self.library, self.options.seed, step)
                while not self.stopping.is_set():
                    try:
                        ready.put(batch, timeout=1)
                        break
                    except queue.Full:
                        continue
                step, tokens = step + 1, tokens + phase.rows * phase.length

        producer = threading.Thread(target=produce, args=(self.step, self.tokens), daemon=True)
        producer.start()
        try:
            while True:
                yield ready.get()
        finally:  # torch aborts the process if it ends while a thread computes
            self.stopping.set()
            producer.join()

    def _restore(self) -> None:
        path = self.options.run / "checkpoint.pt"
        if path.exists():
            saved = torch.load(path, weights_only=True)
            self.network.load_state_dict(saved["network"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.step, self.tokens = saved["step"], saved["tokens"]

    def _save(self) -> None:
        path = self.options.run / "checkpoint.pt"
        partial = path.with_suffix(".partial")
        state = {"network": self.network.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        torch.save({**state, "step": self.step, "tokens": self.tokens}, partial)
        partial.replace(path)

    def _log(self, **values) -> None:
        line = json.dumps({"time": time.strftime("%m-%d %H:%M:%S", time.gmtime()), **values}, default=str)
        with (self.options.run / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizers_of(network: Network) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024; update scale of Liu et al. 2025, arXiv:2502.16982) for the layers' matrices, else AdamW.

    Muon comes in two halves, a thread each: its products are a sixth of a step's, and too small to be shared.
    """
    matrices = [p for name, p in network.named_parameters() if p.ndim == 2 and name != "embedding"]
    others = [p for name, p in network.named_parameters() if p.ndim != 2 or name == "embedding"]
    halves = [
        torch.optim.Muon([{"params": half, "peak_lr": MATRIX_LR}], weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        for half in (matrices[::2], matrices[1::2])
    ]
    adamw = torch.optim.AdamW([{"params": others, "peak_lr": VECTOR_LR}], betas=(0.9, 0.95), weight_decay=0.0)
    return [*halves, adamw]


if __name__ == "__main__":
    main()
