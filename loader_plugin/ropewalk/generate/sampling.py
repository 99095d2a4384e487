"""From a row of logits to the next token: settings, the usual filters, and one seeded draw.

Steps, in this order (each is skipped at its neutral value):

    logit_bias -> repetition_penalty -> frequency_penalty, presence_penalty -> DRY -> temperature
    -> top_k -> top_p -> min_p -> typical -> XTC -> draw

The order and every definition are those of transformers' logits processors; frequency and presence penalties are those
of the OpenAI API; DRY (`dry.py`) and XTC stand where text-generation-webui has them. Temperature 0 (or below 1e-5,
where float32 division would overflow) takes the most likely token, the lowest id among equals, after bias and
penalties. All arithmetic is float32, the cumulative sum of the draw float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ropewalk.base.errors import CheckpointError, RequestError
from ropewalk.base.unthreaded import copied
from ropewalk.generate.dry import Breakers, DryPenalty, NoBreakers, penalise_repeats

NEVER = float("-inf")
GREEDY_BELOW = 1e-5
MAX_SEED = 2**63 - 1
MAX_BIAS = 1e30  # which stays finite in float32 when it is divided by the lowest temperature
DRY_BREAKERS = ("\n", ":", '"', "*")  # as DRY was published; they hold the structure of prose and of chats


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when generation ends.

    temperature: 0 is greedy; below 1 sharper, above 1 flatter. top_k: keep the k most likely (0: off). top_p: keep the
    smallest set whose probability reaches p (1: off). min_p: keep tokens of at least min_p times the highest
    probability (0: off). typical: keep the locally typical set of that probability (1: off; arXiv:2202.00666).
    repetition_penalty: divides positive and multiplies negative logits of tokens among the last `repetition_range`
    tokens of prompt and reply (None: all of them; CTRL, arXiv:1909.05858). frequency_penalty, presence_penalty: taken
    from the logit per occurrence, and once, for tokens of the reply. dry_multiplier (0: off), dry_base,
    dry_allowed_length, dry_range (None: all tokens), dry_sequence_breakers: a penalty against repeating what was
    written, see `dry.py`. xtc_probability (0: off): how often, of the tokens of at least probability xtc_threshold, all
    but the least likely are excluded. logit_bias: token id -> added to its logit
    (-inf: never). seed: None draws a fresh one. max_new_tokens: None goes on to the end of the context. stop: text
    that ends generation and is not shown. stop_token_ids: the same for tokens, besides those of the model.
    ignore_eos: the model's end tokens do not end generation. logprobs: how many alternatives to report per token
    (None: no log probabilities at all); they are those of the model, before any of the settings above.

    Raises:
        RequestError: a value is of the wrong type or out of range.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    typical: float = 1.0
    repetition_penalty: float = 1.0
    repetition_range: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int | None = None
    dry_sequence_breakers: tuple[str, ...] = DRY_BREAKERS
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _number(self, "temperature", 0.0, 100.0)
        _integer(self, "top_k", 0, None)
        _number(self, "top_p", 0.0, 1.0, low_allowed=False)
        _number(self, "min_p", 0.0, 1.0)
        _number(self, "typical", 0.0, 1.0, low_allowed=False)
        _number(self, "repetition_penalty", 0.001, 100.0)
        _number(self, "frequency_penalty", -100.0, 100.0)
        _number(self, "presence_penalty", -100.0, 100.0)
        _integer(self, "repetition_range", 1, None, optional=True)
        _number(self, "dry_multiplier", 0.0, 100.0)
        _number(self, "dry_base", 1.0, 100.0)
        _integer(self, "dry_allowed_length", 1, None)
        _integer(self, "dry_range", 1, None, optional=True)
        _number(self, "xtc_probability", 0.0, 1.0)
        _number(self, "xtc_threshold", 0.0, 1.0)
        _integer(self, "seed", 0, MAX_SEED, optional=True)
        _integer(self, "max_new_tokens", 0, None, optional=True)
        _integer(self, "logprobs", 0, 100, optional=True)
        if not isinstance(self.ignore_eos, bool):
            raise _wrong(self, "ignore_eos", "true or false")
        object.__setattr__(self, "stop", _texts(self, "stop"))
        object.__setattr__(self, "dry_sequence_breakers", _texts(self, "dry_sequence_breakers"))
        object.__setattr__(self, "stop_token_ids", _stop_token_ids(self))
        object.__setattr__(self, "logit_bias", _biases(self))


class Sampler:
    """Chooses the tokens of one reply. Owns the random generator and the counts that the penalties need.

    breakers: `dry_sequence_breakers` as tokens.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], breakers: Breakers | None = None) -> None:
        self.params = params
        self._history = list(prompt_ids) if params.repetition_penalty != 1.0 else []
        self._reply_counts: Counter[int] = Counter()
        self._dry = _dry_penalty(params, prompt_ids, breakers or NoBreakers())
        self._generator = torch.Generator(device="cpu")
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token id, which is remembered for the penalties. logits: [V] float32, left as it is.

        Raises:
            CheckpointError: the model computed NaN or infinity.
            RequestError: a bias names a token that the model lacks, or all tokens are banned.
        """
        params = self.params
        scores = self._penalised(_checked(logits))  # [V]
        token_id = first_of_highest(scores) if params.temperature < GREEDY_BELOW else self._draw(scores)
        if params.repetition_penalty != 1.0:
            self._history.append(token_id)
        self._reply_counts[token_id] += 1
        if self._dry is not None:
            self._dry.append(token_id)
        return token_id

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        params = self.params
        scores = apply_bias(logits, params.logit_bias) if params.logit_bias else logits
        if params.repetition_penalty != 1.0:
            recent = self._history if params.repetition_range is None else self._history[-params.repetition_range :]
            scores = penalise_repetition(scores, recent, params.repetition_penalty)
        if params.frequency_penalty or params.presence_penalty:
            scores = penalise_counts(scores, self._reply_counts, params.frequency_penalty, params.presence_penalty)
        if self._dry is not None:
            scores = penalise_repeats(scores, self._dry.penalties())
        if scores.numpy().max() == NEVER:
            raise RequestError("logit_bias bans every token: leave at least one without -inf")
        return scores

    def _draw(self, scores: torch.Tensor) -> int:
        """One token by its probability among those that the filters keep."""
        params = self.params
        scores = torch.from_numpy(scores.numpy() / np.float32(params.temperature))
        ids = None
        if 0 < params.top_k < scores.numel():
            scores = keep_top_k(scores, params.top_k)
            ids = torch.from_numpy(np.flatnonzero(scores.numpy() > NEVER))  # later filters look at the survivors only
            scores = scores[ids]
        if params.top_p < 1.0:
            scores = keep_top_p(scores, params.top_p)
        if params.min_p > 0.0:
            scores = keep_min_p(scores, params.min_p)
        if params.typical < 1.0:
            scores = keep_typical(scores, params.typical)
        if params.xtc_probability > 0.0 and self._random() < params.xtc_probability:
            scores = exclude_top_choices(scores, params.xtc_threshold)
        weights = torch.softmax(scores, dim=-1).numpy().astype(np.float64)
        cumulative = np.cumsum(weights)
        point = self._random() * cumulative[-1]
        # First entry beyond the point: an entry of weight zero can not be hit.
        position = int(np.searchsorted(cumulative, point, side="right"))
        position = min(position, int(np.flatnonzero(weights)[-1]))
        return position if ids is None else int(ids[position])

    def _random(self) -> float:
        """From 0 to below 1."""
        return float(torch.rand(1, generator=self._generator, dtype=torch.float64))


def first_of_highest(logits: torch.Tensor) -> int:
    """The most likely token of logits [V], the lowest id among equals: numpy promises that, torch does not."""
    return int(np.argmax(logits.numpy()))


def check_stop_tokens(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises:
    RequestError: a token id that the model does not have, so that it would never end a reply.
    """
    for token_id in token_ids:
        if token_id >= vocab_size:
            known = f"the model knows 0 to {vocab_size - 1}"
            raise RequestError(f"stop_token_ids: {token_id!r:.40} is not a token id: {known}")


def apply_bias(logits: torch.Tensor, bias: Mapping[int, float]) -> torch.Tensor:
    """logits [V] plus bias[token id].

    Raises:
        RequestError: a token id that the model does not have.
    """
    outside = [token_id for token_id in bias if token_id >= logits.numel()]
    if outside:
        raise RequestError(f"logit_bias: token id {outside[0]} is out of range: the model knows 0 to {len(logits) - 1}")
    return copied(logits).index_add_(0, torch.tensor(list(bias)), torch.tensor(list(bias.values()), dtype=logits.dtype))


def penalise_repetition(logits: torch.Tensor, token_ids: Sequence[int], penalty: float) -> torch.Tensor:
    """logits [V]; each of `token_ids` once: divided by the penalty where positive, multiplied where negative."""
    ids = torch.tensor(sorted(set(token_ids)), dtype=torch.int64)
    values = logits[ids]
    return copied(logits).index_copy_(0, ids, torch.where(values < 0, values * penalty, values / penalty))


def penalise_counts(
    logits: torch.Tensor, counts: Mapping[int, int], frequency_penalty: float, presence_penalty: float
) -> torch.Tensor:
    """logits [V] minus count * frequency_penalty + presence_penalty for each token with a count."""
    amounts = [-(count * frequency_penalty + presence_penalty) for count in counts.values()]
    ids = torch.tensor(list(counts), dtype=torch.int64)
    return copied(logits).index_add_(0, ids, torch.tensor(amounts, dtype=logits.dtype))


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """logits [V], -inf below the k-th highest; equals of the k-th stay."""
    return _without(logits, logits.numpy() < _highest(logits.numpy(), k))


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """logits [V], -inf outside the smallest set of most likely tokens whose probability reaches p."""
    probabilities = torch.softmax(logits, dim=-1).numpy()
    total, rest = probabilities.sum(dtype=np.float64), 1.0 - p
    order, reached = _in_order(logits.numpy(), probabilities, total - rest)
    before = np.concatenate([np.zeros(1), reached[:-1]])
    is_kept = (total - before).astype(np.float32) > np.float32(rest)
    is_kept[0] = True
    removed = np.ones(len(probabilities), bool)
    removed[order[is_kept]] = False
    return _without(logits, removed)


def keep_min_p(logits: torch.Tensor, min_p: float) -> torch.Tensor:
    """logits [V], -inf where the probability is below min_p times the highest."""
    probabilities = torch.softmax(logits, dim=-1).numpy()
    removed = probabilities < np.float32(min_p) * probabilities.max()
    removed[np.argmax(probabilities)] = False
    return _without(logits, removed)


def keep_typical(logits: torch.Tensor, mass: float) -> torch.Tensor:
    """logits [V], -inf outside the tokens whose surprise is nearest to the entropy, up to the probability `mass`."""
    log_p = torch.log_softmax(logits, dim=-1).numpy()
    probabilities = np.exp(log_p)
    alive = probabilities > 0.0
    entropy = -np.sum(probabilities[alive] * log_p[alive])
    distance = np.abs(-log_p - entropy)
    order, reached = _in_order(-distance, probabilities, mass)
    last = min(int((reached.astype(np.float32) < np.float32(mass)).sum()), len(order) - 1)
    return _without(logits, distance > distance[order[last]])


def exclude_top_choices(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """logits [V], -inf for all tokens of at least probability `threshold` but the least likely one of them (of equals
    the last): what is left is a choice that the model finds good, and not the obvious one.

    Source: p-e-w 2024, github.com/oobabooga/text-generation-webui/pull/6335.
    """
    probabilities = torch.softmax(logits, dim=-1).numpy()
    top = np.flatnonzero((probabilities >= np.float32(threshold)) & (logits.numpy() > NEVER))
    if len(top) < 2:
        return logits
    kept = len(top) - 1 - int(np.argmin(probabilities[top][::-1]))
    return logits.index_fill(0, torch.from_numpy(np.delete(top, kept)), NEVER)


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    """The count-th highest of values [V]; the lowest if there are not so many."""
    return torch.topk(torch.from_numpy(values), min(count, len(values))).values[-1].numpy()


def _in_order(keys: np.ndarray, weights: np.ndarray, mass: float) -> tuple[np.ndarray, np.ndarray]:
    """(indices by falling keys, the sum of weights up to each): as many as it takes to reach `mass`, or some more.

    keys, weights: [V] float32; the sums are float64. Few tokens are likely, and sorting all 152,000 of a large
    vocabulary took 11 ms, half the time in which a model of 1.1 billion parameters computes one.
    """
    count = 256
    while True:
        near = np.flatnonzero(keys >= _highest(keys, count))
        order = near[np.argsort(keys[near], kind="stable")][::-1]
        reached = np.cumsum(weights[order], dtype=np.float64)
        if reached[-1] >= mass or count >= len(keys):
            return order, reached
        count *= 16


def _without(logits: torch.Tensor, removed: np.ndarray) -> torch.Tensor:
    """logits [V], -inf where `removed`: like every step over all of them numpy's (see `base/unthreaded.py`)."""
    return torch.from_numpy(np.where(removed, np.float32(NEVER), logits.numpy()))


def top_logprobs(logits: torch.Tensor, token_id: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log probability of the token, and the `count` most likely (id, log probability). logits: [V] float32."""
    log_p = torch.log_softmax(logits, dim=-1)
    values, ids = torch.topk(log_p, min(count, log_p.numel()))
    return float(log_p[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _dry_penalty(params: SamplingParams, prompt_ids: Sequence[int], breakers: Breakers) -> DryPenalty | None:
    if params.dry_multiplier == 0.0:
        return None
    return DryPenalty(
        params.dry_multiplier, params.dry_base, params.dry_allowed_length, params.dry_range, breakers, prompt_ids
    )


def _checked(logits: torch.Tensor) -> torch.Tensor:
    """On the CPU and finite. A NaN comes out as both extremes, which takes a tenth of looking at each number."""
    logits = logits.detach().to("cpu", torch.float32)
    values = logits.numpy()
    if not (math.isfinite(values.min()) and math.isfinite(values.max())):
        raise CheckpointError(
            "the model computed logits that are not finite: its weights are damaged, or the RoPE settings do not fit it"
        )
    return logits


def _wrong(params: SamplingParams, name: str, accepted: str) -> RequestError:
    return RequestError(f"{name} must be {accepted}, got {getattr(params, name)!r}")


def _number(params: SamplingParams, name: str, low: float, high: float, *, low_allowed: bool = True) -> None:
    value = getattr(params, name)
    accepted = f"a number {'from' if low_allowed else 'above'} {low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise _wrong(params, name, accepted)
    if not low <= value <= high or (value == low and not low_allowed):  # NaN fails the first comparison
        raise _wrong(params, name, accepted)
    object.__setattr__(params, name, float(value))


def _integer(params: SamplingParams, name: str, low: int, high: int | None, *, optional: bool = False) -> None:
    value = getattr(params, name)
    if optional and value is None:
        return
    accepted = f"an integer {f'from {low} to {high}' if high is not None else f'of at least {low}'}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise _wrong(params, name, accepted + (" or None" if optional else ""))
    if value < low or (high is not None and value > high):
        raise _wrong(params, name, accepted + (" or None" if optional else ""))
    object.__setattr__(params, name, int(value))


def _texts(params: SamplingParams, name: str) -> tuple[str, ...]:
    value = getattr(params, name)
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text for text in texts):
        raise _wrong(params, name, "a string or a list of strings, none of them empty")
    return tuple(texts)


def _stop_token_ids(params: SamplingParams) -> tuple[int, ...]:
    ids = params.stop_token_ids
    if not isinstance(ids, (list, tuple)) or not all(_is_token_id(token_id) for token_id in ids):
        raise _wrong(params, "stop_token_ids", "a list of token ids")
    return tuple(int(token_id) for token_id in ids)


def _biases(params: SamplingParams) -> dict[int, float]:
    accepted = f"a mapping of token ids to numbers from {-MAX_BIAS:g} to {MAX_BIAS:g}, or -inf"
    if not isinstance(params.logit_bias, Mapping):
        raise _wrong(params, "logit_bias", accepted)
    for token_id, value in params.logit_bias.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not _is_token_id(token_id) or not is_number or not (abs(value) <= MAX_BIAS or value == NEVER):
            raise _wrong(params, "logit_bias", accepted)
    return {int(token_id): float(value) for token_id, value in params.logit_bias.items()}


def _is_token_id(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 0
