"""From a command's options to a loaded model."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.base.choices import AUTO
from ropewalk.faces.cli.adapter_options import scaling_of_adapters
from ropewalk.faces.cli.options import load_options, model_folder
from ropewalk.faces.cli.terminal import note, progress_bar
from ropewalk.files.embedded import EMBEDDED_CONTEXT, embedded_adapter

if TYPE_CHECKING:
    from ropewalk.model.options import LoadOptions


def load(args: argparse.Namespace, to_talk: bool = False, options: LoadOptions | None = None) -> tuple[Any, Any]:
    """(model, tokenizer); see `load_without_tokenizer`."""
    from ropewalk.text.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(model_folder(args))  # first: a folder without one is told before its weights are read
    return load_without_tokenizer(args, to_talk, options), tokenizer


def load_without_tokenizer(args: argparse.Namespace, to_talk: bool = False, options: LoadOptions | None = None) -> Any:
    """The model, with a progress bar, and the RoPE decision on stderr.

    to_talk: the embedded model gets its longer context and the adapter for it, unless an option says otherwise.
    options: those of `options_for_adapters`, where they are known already.
    """
    from ropewalk.model.loader import load_model

    if options is None:
        options = options_for_adapters(args, to_talk)
    with progress_bar("loading", "layer") as progress:
        model = load_model(model_folder(args), options=options, progress=progress)
    note(model.rope.describe())
    if not model.layer_order.is_plain(model.config.num_layers):
        note(f"layer order: {model.layer_order} ({len(model.layer_order)} layer instances)")
    return model


def options_for_adapters(args: argparse.Namespace, to_talk: bool = False) -> LoadOptions:
    """The options of loading; where none is about RoPE, with the scaling that the adapters given were trained for.

    to_talk: the embedded model gets its own adapter, in `args` as if it had been given, unless one of these options is.
    """
    options = load_options(args)
    if options.rope_scaling == AUTO and getattr(args, "adapter", None):
        return _with_adapters_first(args, model_folder(args), options)
    if options.has_rope:
        return options
    is_extended = to_talk and args.model is None
    if is_extended and not args.adapter:
        args.adapter = [str(embedded_adapter())]
    scaling = scaling_of_adapters(args)
    if scaling is None and is_extended:
        scaling = EMBEDDED_CONTEXT.scaling
    return replace(options, rope_scaling=scaling)


def _with_adapters_first(args: argparse.Namespace, folder: Path, options: LoadOptions) -> LoadOptions:
    """The automatic choice gives way to what an adapter was trained for, if the checkpoint covers too little itself."""
    from ropewalk.config.model import load_model_config
    from ropewalk.rope.automatic import covered_without

    config = load_model_config(folder)
    if covered_without(config.raw, options.max_seq_len, config.source):
        return options
    return replace(options, rope_scaling=scaling_of_adapters(args) or AUTO)
