"""Who guesses tokens ahead for the replies of an engine: the sequence itself, a smaller model, or nobody."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ropewalk.base.choices import SPECULATION
from ropewalk.base.errors import ConfigError
from ropewalk.files.local import local_folder
from ropewalk.generate.generate import Cancelled
from ropewalk.generate.guesses import Guesses
from ropewalk.generate.sampling import SamplingParams
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.generate.scheduler.sequence import Sequence as OpenSequence
from ropewalk.generate.scheduler.timing import DRAFT_PATIENCE, PATIENCE
from ropewalk.generate.speculation import DraftGuesser, NgramGuesser, Vocabulary, check_same_vocabulary
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.text.tokenizer.load import Tokenizer, load_tokenizer

NGRAM, DRAFT = SPECULATION.values[1:]
NUM_SAMPLES = 256  # tokens that two tokenizers are compared by


class Speculation:
    """kind: "ngram", "draft" or None. draft_model: for "draft", a model, or the folder of one, which is loaded for the
    same backend and takes as many threads. A draft model decides the kind if none is given. tokenizer: the model's, to
    be compared with that of the draft model; None without one.

    Raises:
        ConfigError: no such kind; "draft" without a draft model, or another kind with one; a draft model of another
            vocabulary. Others as `load_model`.
    """

    def __init__(self, kind: str | None, draft_model: Any, model: Any, tokenizer: Tokenizer | None) -> None:
        if kind is not None and kind not in (NGRAM, DRAFT):
            raise ConfigError(f"speculation must be {NGRAM!r}, {DRAFT!r} or None, got {kind!r}")
        if kind is None and draft_model is not None:
            kind = DRAFT
        if kind == DRAFT and draft_model is None:
            raise ConfigError(
                f"speculation={DRAFT!r} needs a draft_model: the folder of a smaller model, or that model"
            )
        if kind == NGRAM and draft_model is not None:
            raise ConfigError(f"draft_model has no effect with speculation={NGRAM!r}: leave one of them out")
        self.kind = kind
        self._draft = None if draft_model is None else _draft_scheduler(draft_model, model, tokenizer)

    @property
    def patience(self) -> float:
        """How long a reply takes between two steps (see `StepTimes`)."""
        return PATIENCE if self._draft is None else DRAFT_PATIENCE

    @contextmanager
    def guesses(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        cancelled: Cancelled,
        client: Hashable,
        priority: str,
    ) -> Iterator[Guesses | None]:
        """For one reply. None if nobody guesses: DRY forbids just the repetitions that a look-up would find."""
        if self._draft is not None and len(prompt_ids) <= self._draft.capacity:
            with self._draft.open(prompt_ids, None, client, priority) as sequence:
                yield Guesses(DraftGuesser(_Stoppable(sequence, cancelled)))
        elif self.kind == NGRAM and not params.dry_multiplier:
            yield Guesses(NgramGuesser())
        else:
            yield None


class _Stoppable:
    """A sequence whose calls end when the reply is cancelled."""

    def __init__(self, sequence: OpenSequence, cancelled: Cancelled) -> None:
        self._sequence, self._cancelled = sequence, cancelled
        self.capacity, self.vocab_size, self.truncate = sequence.capacity, sequence.vocab_size, sequence.truncate

    @property
    def length(self) -> int:
        return self._sequence.length

    def forward(self, token_ids: Sequence[int], logits: str = "last") -> torch.Tensor | None:
        return self._sequence.forward(token_ids, logits, cancelled=self._cancelled)


def _draft_scheduler(draft_model: Any, model: Any, tokenizer: Tokenizer) -> Scheduler:
    if isinstance(draft_model, (str, Path)):
        folder = local_folder(draft_model)
        draft_tokenizer = load_tokenizer(folder)
        draft_model = load_model(folder, **model.backend.load_options)
    elif not isinstance(draft_model, Model):
        raise ConfigError(
            f"draft_model must be the folder of a model, or a loaded model, got {type(draft_model).__name__}"
        )
    else:
        folder = Path(draft_model.config.source).parent
        draft_tokenizer = load_tokenizer(folder)
    check_same_vocabulary(
        _vocabulary(tokenizer, model.config.vocab_size), _vocabulary(draft_tokenizer, draft_model.config.vocab_size)
    )
    return Scheduler(draft_model)


def _vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    special = {
        tokenizer.token_bytes(token_id).decode("utf-8", "replace"): token_id for token_id in tokenizer.special_ids
    }
    sampled = range(0, tokenizer.base_vocab_size, max(1, tokenizer.base_vocab_size // NUM_SAMPLES))
    samples = {token_id: tokenizer.token_bytes(token_id) for token_id in sampled}
    return Vocabulary(str(tokenizer.source.parent), size, tokenizer.base_vocab_size, special, samples)
