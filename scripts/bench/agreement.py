"""How far two models, or two ways to run one, agree about the next token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Agreement:
    """Collects rows of logits. kl: of the second from the first, in nats. same_top: the same token is likeliest."""

    kl: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)

    def add(self, expected: torch.Tensor, got: torch.Tensor) -> None:
        """expected, got: [T, V] logits or log probabilities of the same tokens."""
        p, q = (torch.log_softmax(rows.double(), dim=-1) for rows in (expected, got))  # [T, V]
        self.kl += (p.exp() * (p - q)).sum(dim=-1).tolist()
        self.same_top += (p.argmax(dim=-1) == q.argmax(dim=-1)).tolist()

    @property
    def mean_kl(self) -> float:
        """Mean over all rows."""
        return sum(self.kl) / len(self.kl)

    @property
    def top_part(self) -> float:
        """The part of the rows with the same likeliest token."""
        return sum(self.same_top) / len(self.same_top)
