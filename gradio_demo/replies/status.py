"""The state of a reply: one line in words, and how it fills the context."""

from __future__ import annotations

from dataclasses import dataclass

from ropewalk.generate.generate import GenerationStats
from ropewalk.gradio_demo.replies.reply import READING, WAITING, Snapshot

ENDS = {
    "stop": "",
    "length": "ended at the longest reply",
    "context": "ended because the context is full",
    "cancelled": "stopped",
}


@dataclass(frozen=True, slots=True)
class Meter:
    """Tokens of the context: `cached` and `read` of the prompt, `written` by the model, out of `size`."""

    cached: int = 0
    read: int = 0
    written: int = 0
    size: int = 0

    @property
    def used(self) -> int:
        """All of them together."""
        return self.cached + self.read + self.written


def describe(snapshot: Snapshot, dropped: int = 0) -> str:
    """One line about how far a reply is, and how fast it got there."""
    if snapshot.error is not None:
        return snapshot.error
    forgotten = [f"{dropped} oldest messages left out"] if dropped else []
    if snapshot.phase == WAITING:
        place = f": number {snapshot.place} in the queue" if snapshot.place else ""
        return " · ".join([f"waiting for the model{place}", *forgotten])
    if snapshot.phase == READING:
        done, total = snapshot.read
        return " · ".join([f"reading the prompt: {done} of {total} tokens", *forgotten])
    ended = ENDS.get(snapshot.finish_reason or "", "")
    return " · ".join([*_speeds(snapshot.stats), *forgotten, *([ended] if ended else [])])


def meter(stats: GenerationStats | None, size: int) -> Meter:
    """How the context is filled."""
    if stats is None:
        return Meter(size=size)
    prompt = min(stats.prompt_tokens, stats.context_used)  # some of it may have been dropped meanwhile
    reused = min(stats.reused_tokens, prompt)
    return Meter(reused, prompt - reused, max(stats.context_used - prompt, 0), stats.context_size)


def _speeds(stats: GenerationStats | None) -> list[str]:
    if stats is None:
        return []
    read = stats.prompt_tokens - stats.reused_tokens
    right = f", {stats.accepted_tokens} of {stats.guessed_tokens} guesses right" if stats.guessed_tokens else ""
    shifted = f", {stats.shifted_tokens} of them shifted" if stats.shifted_tokens else ""
    if stats.dropped_tokens:
        shifted = f", {stats.shifted_tokens} shifted, the {stats.dropped_tokens} oldest dropped on the way"
    return [
        f"prompt {stats.prompt_tokens} tokens, {stats.reused_tokens} from the cache{shifted}",
        f"{read} read at {stats.prompt_tokens_per_s:,.0f} tokens/s",
        f"{stats.new_tokens} written at {stats.new_tokens_per_s:,.0f} tokens/s{right}",
    ]
