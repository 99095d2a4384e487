"""What transformers can ask of a model and this one cannot do: each is refused by name, with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ropewalk.base.errors import RequestError, UnsupportedError
from ropewalk.faces.hf.history import TokenHistory

NO_TRAINING = "a ropewalk model cannot be trained: train with the original model, then load the adapter here"
MANY = "only one sequence is run at a time: call once for each (their common beginning is computed once)"


class RefusesTheRest:
    """Methods of `PreTrainedModel` that make no sense without parameters."""

    def train(self, mode: bool = True) -> Any:
        """Raises UnsupportedError, unless mode is False."""
        if mode:
            raise UnsupportedError(NO_TRAINING)
        return super().train(False)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raises UnsupportedError."""
        raise UnsupportedError(
            "a ropewalk model is not saved through transformers: copy its folder, or write another layer order with "
            "`ropewalk export-layers`"
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Raises UnsupportedError."""
        self.save_pretrained()

    def load_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises UnsupportedError."""
        raise UnsupportedError("PEFT cannot wrap a ropewalk model: use load_adapter_folder(folder, name)")

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises UnsupportedError."""
        raise UnsupportedError(NO_TRAINING)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises UnsupportedError."""
        raise UnsupportedError("PEFT cannot wrap a ropewalk model: use set_adapters([(name, weight), ...])")

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Raises UnsupportedError."""
        raise UnsupportedError(NO_TRAINING)

    def enable_input_require_grads(self, *args: Any, **kwargs: Any) -> None:
        """Raises UnsupportedError."""
        raise UnsupportedError(NO_TRAINING)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Raises UnsupportedError, unless it is False."""
        if requires_grad:
            raise UnsupportedError(NO_TRAINING)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The model itself, if the device and dtype asked for are its own.

        Raises:
            UnsupportedError: another device or dtype.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        moved = device is not None and (device.type, device.index or 0) != (self.device.type, self.device.index or 0)
        if moved or dtype not in (None, self.dtype):
            raise UnsupportedError(
                f"the model is on {self.device} with {self.dtype} logits and cannot be moved or converted: choose the "
                'device when loading (backend="reference", device=...)'
            )
        return self

    def cpu(self) -> Any:
        """As `to`."""
        return self.to("cpu")

    def cuda(self, device: int | torch.device | None = None) -> Any:
        """As `to`."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def half(self) -> Any:
        """As `to`."""
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        """As `to`."""
        return self.to(torch.bfloat16)

    def float(self) -> Any:
        """As `to`."""
        return self.to(torch.float32)

    def double(self) -> Any:
        """As `to`."""
        return self.to(torch.float64)


def check_refused(arguments: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for an argument of `forward` that asks for something; None and False ask for nothing."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise UnsupportedError(f"{name} is not supported by ropewalk models: leave it out")


def check_mask(mask: torch.Tensor | None) -> None:
    """Raises UnsupportedError where a mask hides tokens."""
    hidden = 0 if mask is None else int((mask == 0).sum())
    if hidden:
        raise UnsupportedError(
            f"attention_mask hides {hidden} tokens, and padding is not supported: give the sequence without padding; "
            "if it only contains the padding token as text, pass attention_mask=torch.ones_like(input_ids)"
        )


def check_history(past: Any) -> TokenHistory:
    """Returns the history. Raises RequestError for keys and values of another model, which have no meaning here."""
    if not isinstance(past, TokenHistory):
        raise RequestError(
            f"past_key_values must be what an earlier call of this model returned, got {type(past).__name__}"
        )
    return past


def one_sequence(ids: Any, name: str, length: int | None = None) -> list[int]:
    """The tokens of [1, T] ids.

    Raises:
        RequestError: not an integer tensor of that shape. UnsupportedError: several sequences.
    """
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        got = f"{ids.dtype} of shape {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise RequestError(f"{name} must be an integer tensor of shape [1, T], got {got}")
    if ids.shape[0] != 1:
        raise UnsupportedError(f"{name} holds {ids.shape[0]} sequences: {MANY}")
    if length is not None and ids.shape[1] != length:
        raise RequestError(f"{name} must be as long as input_ids ({length}), got {ids.shape[1]}")
    return ids[0].tolist()


def check_prompt(ids: Any) -> None:
    """Raises RequestError for a prompt without tokens, of which transformers makes errors of its own."""
    if isinstance(ids, torch.Tensor) and not ids.numel():
        raise RequestError("there are no token ids; at least one is needed")


def check_generation(config: Any, model_kwargs: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for options of `generate` that cannot be served. config: a `GenerationConfig`."""
    for name in ("num_beams", "num_return_sequences"):
        if (getattr(config, name, None) or 1) > 1:
            raise UnsupportedError(f"{name}={getattr(config, name)}: {MANY}")
    check_refused({name: model_kwargs.get(name) for name in ("inputs_embeds", "encoder_outputs")})
    asked = ("output_hidden_states", "output_attentions", "assistant_early_exit", "use_mtp")
    check_refused({name: getattr(config, name, None) for name in asked})
    cache = getattr(config, "cache_implementation", None)
    if cache is not None and not cache.startswith("dynamic"):  # which generate() sets for assistants
        raise UnsupportedError(f"cache_implementation={cache!r}: a ropewalk model brings its own cache, leave it out")
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        check_mask(mask)
