"""A front end that drops the beginning of a conversation: what follows is moved down instead of being read again."""

from __future__ import annotations

import torch

from hf_checkpoint import ours, tokens
from ropewalk.hf import RopewalkForCausalLM


def shifted(model: RopewalkForCausalLM, whole: list[int], cut: slice) -> tuple[int, int, list[int]]:
    """(tokens moved, tokens found, the reply) for a prompt that lacks a stretch of an earlier one."""
    model.generate(torch.tensor([whole]), max_new_tokens=1, do_sample=False)
    lacking = whole[: cut.start] + whole[cut.stop :] + [7, 8, 9]
    written = model.generate(torch.tensor([lacking]), max_new_tokens=4, do_sample=False)
    stats = model.last_stats
    return stats.shifted_tokens, stats.reused_tokens, written[0, len(lacking) :].tolist()


def test_a_prompt_that_lacks_a_stretch_is_moved_down_where_the_model_was_told_to() -> None:
    whole = tokens(200)[0].tolist()
    assert shifted(ours(context_shift=True), whole, slice(30, 120))[:2] == (80, 110)


def test_without_it_such_a_prompt_is_read_again() -> None:
    whole = tokens(200)[0].tolist()
    moved, found, reply = shifted(ours(), whole, slice(30, 120))
    assert moved == 0 and found <= 64
    lacking = whole[:30] + whole[120:] + [7, 8, 9]
    fresh = ours().generate(torch.tensor([lacking]), max_new_tokens=4, do_sample=False)
    assert reply == fresh[0, len(lacking) :].tolist()
