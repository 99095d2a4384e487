"""The methods of RoPE scaling: each is a small frozen record that gives inverse frequencies and an attention scale.

Plain RoPE turns feature pair i of a head by pos * inv[i], with inv[i] = theta ** (-2 i / R) for R rotated features
(Su et al. 2021, arXiv:2104.09864, section 3.2.2). A scaling method changes inv, and some also multiply cos and sin by
an attention scale. Everything is computed in float64.

Every method has `frequencies(theta, rotary_dim, seq_len)`:
    theta: the base, above 1; rotary_dim: R, even; seq_len: the length that the whole call reaches (methods that do not
    depend on the length ignore it). Result: (inv [R/2] float64, attention scale).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

Frequencies = tuple[np.ndarray, float]


@dataclass(frozen=True, slots=True)
class NoScaling:
    """inv[i] = theta ** (-2 i / R)."""

    name: ClassVar[str] = "none"
    depends_on_length: ClassVar[bool] = False

    def frequencies(self, theta: float, rotary_dim: int, seq_len: int) -> Frequencies:
        return _plain(theta, rotary_dim), 1.0


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """inv / factor, the same as dividing positions (position interpolation, Chen et al. 2023, arXiv:2306.15595)."""

    factor: float
    name: ClassVar[str] = "linear"
    depends_on_length: ClassVar[bool] = False

    def frequencies(self, theta: float, rotary_dim: int, seq_len: int) -> Frequencies:
        return _plain(theta, rotary_dim) / self.factor, 1.0


@dataclass(frozen=True, slots=True)
class NtkScaling:
    """theta * alpha ** (R / (R - 2)): the highest frequency stays, the lowest is divided by alpha ("NTK-aware")."""

    alpha: float
    name: ClassVar[str] = "ntk"
    depends_on_length: ClassVar[bool] = False

    def frequencies(self, theta: float, rotary_dim: int, seq_len: int) -> Frequencies:
        return _plain(_ntk_theta(theta, self.alpha, rotary_dim), rotary_dim), 1.0


@dataclass(frozen=True, slots=True)
class LinearNtkScaling:
    """Both knobs of the exllama loaders at once: the frequencies of NTK-aware scaling, divided by factor."""

    factor: float
    alpha: float
    name: ClassVar[str] = "linear+ntk"
    depends_on_length: ClassVar[bool] = False

    def frequencies(self, theta: float, rotary_dim: int, seq_len: int) -> Frequencies:
        return _plain(_ntk_theta(theta, self.alpha, rotary_dim), rotary_dim) / self.factor, 1.0


@dataclass(frozen=True, slots=True)
class DynamicNtkScaling:
    """NTK-aware scaling by (factor * n / original - (factor - 1)) for a length n beyond original; plain up to it."""

    factor: float
    original: int
    name: ClassVar[str] = "dynamic"
    depends_on_length: ClassVar[bool] = True

    @property
    def steady_length(self) -> int:
        """Up to this length all frequencies are the same."""
        return self.original

    def frequencies(self, theta: float, rotary_dim: int, seq_len: int) -> Frequencies:
        alpha = self.factor * max(seq_len, self.original) / self.original - (self.factor - 1)
        return _plain(_ntk_theta(theta, alpha, rotary_dim), rotary_dim), 1.0


@dataclass(frozen=True, slots=True)
class NtkByPartsScaling:
    """Plain for fast pairs, NTK-aware for middle pairs, linear for slow pairs, with ramps between them.

    With turns(i) = original * inv[i] / 2 pi: plain above 16 turns, down to 2 a blend of plain and the rest; of the
    rest, NTK-aware above 1.25 turns, linear below 0.75. The constants are those of bhenrym14's Airophin models (their
    training patch in qlora-airoboros-longcontext). The first version of that patch measured turns over the extended
    length: to get it, give that length as `original`, with the same factor.
    """

    factor: float
    original: int
    name: ClassVar[str] = "ntk-by-parts"
    depends_on_length: ClassVar[bool] = False

    def frequencies(self, theta: float, rotary_dim: int, seq_len: int) -> Frequencies:
        plain = _plain(theta, rotary_dim)
        ntk = _plain(_ntk_theta(theta, self.factor, rotary_dim), rotary_dim)
        slow = _ramp(1.25, 0.75, theta, rotary_dim, self.original)  # [R/2]
        rest = plain / self.factor * slow + ntk * (1 - slow)
        interpolated = _ramp(16, 2, theta, rotary_dim, self.original)  # [R/2]
        return rest * interpolated + plain * (1 - interpolated), 1.0


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Plain for pairs that make more than beta_fast turns over original, linear below beta_slow, a ramp between.

    cos and sin are multiplied by 0.1 ln(factor) + 1, or by attention_factor (Peng et al. 2023, arXiv:2309.00071).
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the ends of the ramp outwards to whole pairs
    attention_factor: float | None = None  # None: by the formula
    mscale: float | None = None  # with mscale_all_dim: the ratio of the formula weighted by each (DeepSeek)
    mscale_all_dim: float | None = None
    name: ClassVar[str] = "yarn"
    depends_on_length: ClassVar[bool] = False

    def frequencies(self, theta: float, rotary_dim: int, seq_len: int) -> Frequencies:
        plain = _plain(theta, rotary_dim)
        slow = _ramp(self.beta_fast, self.beta_slow, theta, rotary_dim, self.original, self.truncate)  # [R/2]
        return plain / self.factor * slow + plain * (1 - slow), self._attention_scale()

    def _attention_scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * math.log(self.factor) + 1) / (
                0.1 * self.mscale_all_dim * math.log(self.factor) + 1
            )
        return 0.1 * math.log(self.factor) + 1


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """Another method with factor n / original for a length n beyond `start`, and start / original up to it.

    The "Dynamic" classes of jquesnelle/yarn: for a model that was not fine-tuned, start is the original length (up to
    which it is plain RoPE); for one that was, it is the extended length.
    """

    inner: LinearScaling | NtkByPartsScaling | YarnScaling  # its factor is not used
    original: int
    start: int
    depends_on_length: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"dynamic-{self.inner.name}"

    @property
    def steady_length(self) -> int:
        """Up to this length all frequencies are the same."""
        return self.start

    def frequencies(self, theta: float, rotary_dim: int, seq_len: int) -> Frequencies:
        factor = max(seq_len, self.start) / self.original
        return replace(self.inner, factor=factor).frequencies(theta, rotary_dim, seq_len)


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """By wavelength w = 2 pi / inv: plain below original / high, inv / factor above original / low, a blend between.

    The blend weighs plain by (original / w - low) / (high - low) (Llama 3.1's reference code).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original: int
    name: ClassVar[str] = "llama3"
    depends_on_length: ClassVar[bool] = False

    def frequencies(self, theta: float, rotary_dim: int, seq_len: int) -> Frequencies:
        plain = _plain(theta, rotary_dim)
        turns = self.original * plain / (2 * math.pi)  # [R/2]
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return (1 - kept) * plain / self.factor + kept * plain, 1.0


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """inv[i] / short_factor[i] for lengths up to original, inv[i] / long_factor[i] beyond (LongRoPE, arXiv:2402.13753).

    cos and sin are multiplied by attention_factor, or by sqrt(1 + ln(factor) / ln(original)), at any length.
    """

    factor: float
    original: int
    short_factor: tuple[float, ...]  # R/2 of them
    long_factor: tuple[float, ...]
    attention_factor: float | None
    name: ClassVar[str] = "longrope"
    depends_on_length: ClassVar[bool] = True

    @property
    def steady_length(self) -> int:
        """Up to this length all frequencies are the same."""
        return self.original

    def frequencies(self, theta: float, rotary_dim: int, seq_len: int) -> Frequencies:
        factors = self.long_factor if seq_len > self.original else self.short_factor
        return _plain(theta, rotary_dim) / np.array(factors), self._attention_scale()

    def _attention_scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original))


@dataclass(frozen=True, slots=True)
class ProportionalScaling:
    """The first `proportion` of the pairs turns by inv / factor, the others stand still (Gemma-type models)."""

    proportion: float
    factor: float
    name: ClassVar[str] = "proportional"
    depends_on_length: ClassVar[bool] = False

    def frequencies(self, theta: float, rotary_dim: int, seq_len: int) -> Frequencies:
        inv = _plain(theta, rotary_dim) / self.factor
        inv[int(self.proportion * rotary_dim // 2) :] = 0.0
        return inv, 1.0


RopeMethod = (
    NoScaling
    | LinearScaling
    | NtkScaling
    | LinearNtkScaling
    | DynamicNtkScaling
    | NtkByPartsScaling
    | YarnScaling
    | DynamicScaling
    | Llama3Scaling
    | LongRopeScaling
    | ProportionalScaling
)


def _plain(theta: float, rotary_dim: int) -> np.ndarray:
    """theta ** (-2 i / R): [R/2] float64."""
    return 1.0 / theta ** (np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def _ntk_theta(theta: float, alpha: float, rotary_dim: int) -> float:
    return theta * alpha ** (rotary_dim / (rotary_dim - 2))


def _ramp(
    fast_turns: float, slow_turns: float, theta: float, rotary_dim: int, length: int, truncate: bool = True
) -> np.ndarray:
    """0 for pairs that make at least fast_turns over the length, 1 at most slow_turns, linear in i between: [R/2].

    The pair that makes n turns is R ln(length / (2 pi n)) / (2 ln theta).
    """
    ends = [
        rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (fast_turns, slow_turns)
    ]
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if truncate else ends
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # a step, as in the reference code: pair `low` itself stays plain
    return np.clip((np.arange(rotary_dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
