"""The model as transformers knows models: a `PreTrainedModel` whose forward pass is ropewalk's.

It has no parameters and runs one sequence at a time. What transformers can ask for and this model cannot do is refused
(`refusals.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ropewalk.adapters.request import Request, checked_request
from ropewalk.base.choices import RESCALE_MODE
from ropewalk.base.errors import RequestError
from ropewalk.base.memory import return_freed_memory
from ropewalk.engine.speculation import Speculation
from ropewalk.faces.hf.hf_config import make_config, make_generation_config
from ropewalk.faces.hf.history import TokenHistory
from ropewalk.faces.hf.refusals import (
    RefusesTheRest,
    check_generation,
    check_history,
    check_mask,
    check_prompt,
    check_refused,
    one_sequence,
)
from ropewalk.faces.hf.runner import GUIDANCE, Runner
from ropewalk.generate.generate import Cancelled, GenerationStats, Progress
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.text.tokenizer.load import load_tokenizer

STEP_OPTIONS = ("use_cache", "logits_to_keep", "num_logits_to_keep")  # what `generate` passes on to every step


def from_pretrained(
    folder: str | Path,
    speculation: str | None = None,
    draft_model: Any = None,
    context_shift: bool = False,
    **options: Any,
) -> RopewalkForCausalLM:
    """Load a model folder; the other options and errors are those of `ropewalk.load_model`.

    speculation, draft_model: who guesses tokens ahead in `generate`, as for `ropewalk.Engine`; the text is the same
        without.
    context_shift: a prompt that is an earlier one without a stretch after its beginning, as when a front end drops the
        oldest messages, is not read again: what follows the stretch is moved down in the cache. The text may differ.
    """
    return RopewalkForCausalLM(load_model(folder, **options), speculation, draft_model, context_shift)


class RopewalkForCausalLM(RefusesTheRest, PreTrainedModel, GenerationMixin):
    """A loaded `Model` for transformers' `generate` and whatever else takes a causal language model.

    Logits are float32 and equal those of `Model.forward` bit for bit. Replies in several threads share their steps;
    what samples in them draws from torch's one random state, as always in transformers.

    speculation, draft_model, context_shift: see `from_pretrained`.
    logits_by_default: how many of the last tokens get logits in a direct call without `logits_to_keep`; 0 means all,
        as in transformers. Logits of a whole long text take much memory: 4 bytes * tokens * vocabulary.
    """

    _supports_sdpa = True  # else transformers warns that attention is slow
    _supports_cache_class = True  # asked for by transformers before 4.54 when a cache is handed back

    def __init__(
        self, model: Model, speculation: str | None = None, draft_model: Any = None, context_shift: bool = False
    ) -> None:
        config = make_config(model)
        super().__init__(config)
        self.generation_config = make_generation_config(model)
        self.logits_by_default = 0
        self._runner: Runner | None = Runner(model, _speculation(speculation, draft_model, model), context_shift)
        self._device = model.backend.device
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        speculation: str | None = None,
        draft_model: Any = None,
        context_shift: bool = False,
        **options: Any,
    ) -> RopewalkForCausalLM:
        """As `ropewalk.hf.from_pretrained`."""
        return cls(load_model(folder, **options), speculation, draft_model, context_shift)

    @property
    def ropewalk_model(self) -> Model:
        """The model underneath: its adapters, layer order, RoPE, memory.

        Raises:
            RequestError: it has been unloaded.
        """
        return self._loaded.model

    @property
    def device(self) -> torch.device:
        """Where token ids are expected and logits are returned."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits; weights are stored in fewer bits."""
        return torch.float32

    @property
    def last_stats(self) -> GenerationStats | None:
        """Tokens, times and reuse of the newest `generate`, current while it runs; None before its prompt is read."""
        return None if self._runner is None else self._runner.last_stats

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return self.ropewalk_model.adapters

    @property
    def used_adapters(self) -> tuple[tuple[Any, ...], ...]:
        """The adapters in use: (name, weight), and the instances if a use names any."""
        uses = self._loaded.adapters
        return tuple((use.name, use.weight) + ((use.instances,) if use.instances else ()) for use in uses)

    def load_adapter_folder(self, folder: str | Path, name: str, **options: Any) -> None:
        """Load a PEFT folder under a name; `set_adapters` then uses it. Options and errors are those of
        `Model.load_adapter`."""
        self.ropewalk_model.load_adapter(folder, name, **options)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, and stop using it.

        Raises:
            RequestError: there is no adapter of that name.
        """
        self.ropewalk_model.unload_adapter(name)
        self._loaded.adapters = tuple(use for use in self._loaded.adapters if use.name != name)

    def set_adapters(self, adapters: Request | None) -> None:  # PEFT's mixin has no method of this name
        """Use these loaded adapters from now on; None uses none. For example "storm+poet:0.5", the same as
        [("storm", 1.0), ("poet", 0.5)], or "storm@8-11" on some instances of the layer order.

        Raises:
            RequestError: an invalid request, or a name that is not loaded. The adapters in use then stay.
        """
        runner = self._loaded
        runner.model.adapter_key(adapters)
        runner.adapters = checked_request(adapters)

    def rescale(self, rope_scaling: Any = None, mode: str = RESCALE_MODE.default, **rope: Any) -> None:
        """Another RoPE from the next step on, for open conversations as well; arguments and errors as for
        `ropewalk.Engine.rescale`."""
        self._loaded.rescale(mode, rope_scaling=rope_scaling, **rope)

    def watch(self, progress: Progress | None = None, cancelled: Cancelled | None = None) -> None:
        """From now on, report while tokens are read: stopping criteria are called only once a prompt has been read.

        progress: called with (tokens done, tokens to do) after every layer. cancelled: called before every layer; True
            ends the call with a RequestError that begins with "cancelled", and keeps what was computed.
        """
        self._loaded.progress, self._loaded.cancelled = progress, cancelled

    def unload(self) -> None:
        """Free weights, caches and adapters. Any further call is refused; a second `unload` does nothing."""
        self._runner = None
        return_freed_memory()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Prompts are read in chunks whatever `prefill_chunk_size` says.

        Raises:
            UnsupportedError: beams, several sequences, padding, embeddings as input, hidden states. RequestError: the
            prompt does not fit.
        """
        check_prompt(args[0] if args else kwargs.get("inputs", kwargs.get("input_ids")))
        with self._loaded.reply():
            return super().generate(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TokenHistory | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        return_dict: bool | None = None,
        num_logits_to_keep: int | None = None,
        **refused: Any,
    ) -> CausalLMOutputWithPast | tuple[torch.Tensor, ...]:
        """Logits of one sequence, or with `labels` its loss.

        input_ids: [1, T] integers, which follow the tokens of `past_key_values` (a `TokenHistory` of an earlier call).
            The part of the whole that the cache holds is not computed again.
        labels: [1, T], -100 where nothing is scored; the loss is the mean over the other labels except the first.
            The logits are then those of the last token only, since those of a long text would not fit into memory.
        logits_to_keep: how many of the last tokens get logits; 0: all. Within `generate` the default is 1.
            num_logits_to_keep is its name in transformers before 4.48.
        Returns logits [1, kept, V] float32, `past_key_values` (unless use_cache is False), loss.

        Raises:
            RequestError: no tokens, unknown ones, or more than the context holds. UnsupportedError: an argument that is
            not implemented, by name.
        """
        runner = self._loaded
        check_refused(refused)
        ids = one_sequence(input_ids, "input_ids")
        check_mask(attention_mask)
        if labels is not None:
            loss = runner.loss(ids, one_sequence(labels, "labels", len(ids)))
            past_key_values, logits_to_keep = None, 1
        elif logits_to_keep is None:
            logits_to_keep = num_logits_to_keep
        history = self._history(past_key_values)
        logits = runner.extend(history, ids, self._rows(logits_to_keep, len(ids)))[None]  # [1, kept, V]
        output = CausalLMOutputWithPast(
            loss=None if labels is None else loss,
            logits=logits,
            past_key_values=None if use_cache is False or labels is not None else history,
        )
        return output.to_tuple() if return_dict is False else output

    def get_prompt_logits(self, input_ids: Any) -> torch.Tensor:
        """Logits after every token: [1, T] or [T] ids -> [1, T, V] float32."""
        ids = one_sequence(torch.as_tensor(input_ids).reshape(1, -1), "input_ids")
        return self._loaded.extend(TokenHistory(), ids, len(ids))[None]

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: TokenHistory | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `forward` for the next step: the tokens [1, T] that the history does not have yet.

        If the conversation was edited meanwhile, the history is cropped to the common prefix.
        """
        history = TokenHistory() if past_key_values is None else past_key_values
        row = input_ids[0]
        history.truncate_(min(history.common_prefix(row.cpu().numpy()), len(row) - 1))
        wanted = {name: kwargs[name] for name in STEP_OPTIONS if name in kwargs}
        return {
            "input_ids": input_ids[:, len(history) :],
            "past_key_values": history,
            "attention_mask": attention_mask,
            **wanted,
        }

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """Called by every version of `generate` once all options are known: what cannot be done is refused here."""
        check_generation(generation_config, model_kwargs)
        generation_config.prefill_chunk_size = None
        past = model_kwargs.get("past_key_values")
        if past is not None:
            check_history(past)
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = TokenHistory()

    def _history(self, past: TokenHistory | None) -> TokenHistory:
        """The tokens before those of a call. Within a reply, a call without a history is the first pass of guidance."""
        if past is None:
            return TokenHistory(GUIDANCE) if self._loaded.is_replying else TokenHistory()
        return check_history(past)

    def _rows(self, logits_to_keep: int | None, num_tokens: int) -> int:
        if logits_to_keep is None:
            logits_to_keep = 1 if self._loaded.is_replying else self.logits_by_default
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise RequestError(f"logits_to_keep must be an integer of at least 0 (all), got {logits_to_keep!r:.80}")
        return min(logits_to_keep, num_tokens) or num_tokens

    @property
    def _loaded(self) -> Runner:
        if self._runner is None:
            raise RequestError("this model has been unloaded: load it again with ropewalk.hf.from_pretrained")
        return self._runner


def _speculation(kind: str | None, draft_model: Any, model: Model) -> Speculation | None:
    """Raises ConfigError as `Speculation`. The tokenizer is read only to compare it with that of a draft model."""
    if kind is None and draft_model is None:
        return None
    tokenizer = None if draft_model is None else load_tokenizer(Path(model.config.source).parent)
    return Speculation(kind, draft_model, model, tokenizer)
