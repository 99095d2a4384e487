"""The one model that everybody on the page shares: loaded beside the old one, put in its place once it is ready."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ropewalk.base.choices import MAX_RUNNING, SPECULATION
from ropewalk.base.errors import RequestError, RopewalkError
from ropewalk.base.memory import available_bytes, format_bytes
from ropewalk.config.layer_order import LayerOrder
from ropewalk.engine.engine import Engine
from ropewalk.engine.kept_folder import KeptFolder
from ropewalk.files.embedded import EMBEDDED_CONTEXT
from ropewalk.generate.generate import Progress
from ropewalk.gradio_demo.model_bar.settings import (
    FieldError,
    LoadSettings,
    checkpoint_settings,
    field_of,
    load_options,
    read_settings,
    rescale_arguments,
    suggested_settings,
)
from ropewalk.gradio_demo.shared.access import EMBEDDED, Access
from ropewalk.model.backend_choice import choose_backend
from ropewalk.model.info import ModelInfo, model_info
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.options import LoadOptions
from ropewalk.text.tokenizer.load import Tokenizer, load_tokenizer

RESCALED = ("max_seq_len", "compress_pos_emb", "alpha_value", "rope_method", "rope_factor")  # without loading again
FOLDER = "folder"  # the field for errors that belong to none of the settings


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model that answers, and what was asked for and found when it was loaded."""

    name: str
    folder: Path
    settings: LoadSettings
    info: ModelInfo
    model: Model
    tokenizer: Tokenizer
    engine: Engine

    @property
    def is_embedded(self) -> bool:
        """True for the small model that comes with the package."""
        return self.name == EMBEDDED


class Workbench:
    """Loads, holds and unloads. Running replies keep the model that they began with until they end.

    max_running: how many replies may run at a time. They share the memory of the cache. kept_folder: where documents
    are kept that were read once.
    """

    def __init__(self, access: Access, kept_folder: KeptFolder, max_running: int = MAX_RUNNING) -> None:
        self.access = access
        self.kept_folder = kept_folder
        self._max_running = max_running
        self._loaded: Loaded | None = None
        self._generation = 0
        self._loading = threading.Lock()
        self._placing = threading.Lock()

    @property
    def generation(self) -> int:
        """Counts loads and unloads, for pages that show something about the model."""
        return self._generation

    @property
    def loaded(self) -> Loaded | None:
        """The model that new requests get."""
        return self._loaded

    def require(self) -> Loaded:
        """The model that new requests get.

        Raises:
            RequestError: none is loaded.
        """
        if self._loaded is None:
            raise RequestError("no model is loaded: choose a folder in the model bar and press Load")
        return self._loaded

    def suggest(self, name: str) -> LoadSettings:
        """What the fields show for a folder.

        Raises:
            FieldError: it may not be read, or holds no model.
        """
        if self.access.must_be_fetched(name):
            return LoadSettings()  # everything as the checkpoint says, once it is here
        try:
            folder = self.access.open(name)
            return suggested_settings(folder, self._shown_name(name) == EMBEDDED)
        except RopewalkError as error:
            raise FieldError(FOLDER, str(error)) from error

    def plan(self, name: str, values: Mapping[str, Any]) -> ModelInfo | None:
        """What `load` would give, without reading weights; None for a model that must be downloaded first.

        Raises:
            FieldError: names the field that is wrong.
        """
        if self.access.must_be_fetched(name):
            read_settings(values)
            return None
        folder, _, options = self._options(name, values)
        return self._info(folder, options)

    def load(self, name: str, values: Mapping[str, Any], progress: Progress | None = None) -> Loaded:
        """Load a model and put it in place; if anything is wrong, the old one stays.

        Raises:
            FieldError: names the field that is wrong, or the folder if memory is too small. RequestError: someone else
                is loading.
        """
        with self._alone():
            folder, settings, options = self._options(name, values, fetch=True)
            info = self._info(folder, options)
            self._check_memory(info, options)
            draft = self._draft_folder(settings)
            model, tokenizer = _read(folder, options, progress)
            engine = self._engine(model, tokenizer, settings.speculation, draft)
            loaded = Loaded(self._shown_name(name), folder, settings, info, model, tokenizer, engine)
            self.use_adapters(loaded, self.suggested_adapters(loaded))  # kept documents were read with them
            self._put(loaded)
        gc.collect()  # the old model's memory goes back now, not at some later request
        return loaded

    def unload(self) -> None:
        """Free the model; nothing happens if there is none."""
        self._put(None)
        gc.collect()

    def set_layer_order(self, order: LayerOrder) -> None:
        """Run the loaded model in that order from now on, once running replies have ended.

        Raises:
            RequestError: no model. ConfigError: the order does not fit it.
        """
        loaded = self.require()
        with loaded.engine.exclusive():
            loaded.model.set_layer_order(order)

    def rescale(self, values: Mapping[str, Any], mode: str) -> Loaded:
        """Give the loaded model the RoPE and the context length in the fields, while its conversations are open.

        mode: "rotate" or "recompute", as for `Engine.rescale`.

        Raises:
            RequestError: no model, a running reply is too long, or someone is loading or has unloaded it meanwhile.
                FieldError: names the field that is wrong.
        """
        settings = read_settings(values)
        with self._alone():
            loaded = self.require()
            try:
                arguments = rescale_arguments(settings, checkpoint_settings(loaded.folder))
                loaded.engine.rescale(mode=mode, **arguments)
            except FieldError:
                raise
            except RopewalkError as error:
                raise _of_field(error) from error
            rescaled = _rescaled(loaded, settings)
            self._put(rescaled, instead_of=loaded)
        return rescaled

    def adapters(self, loaded: Loaded) -> list[str]:
        """The LoRAs that can be used with a model."""
        return list(self.access.adapter_folders(loaded.folder))

    def suggested_adapters(self, loaded: Loaded) -> list[str]:
        """What requests use until a person chooses others: the LoRA of the embedded model, under its scaling."""
        scaling = loaded.settings.rope_method, loaded.settings.rope_factor
        is_as_suggested = loaded.is_embedded and scaling == (EMBEDDED_CONTEXT.method, EMBEDDED_CONTEXT.factor)
        return [EMBEDDED_CONTEXT.adapter] if is_as_suggested else []

    def use_adapters(self, loaded: Loaded, chosen: Sequence[str]) -> list[tuple[str, float]]:
        """Load the chosen adapters that are not loaded yet; returns the `adapters` of a request. "storm:0.5" is storm
        with that weight.

        Raises:
            RequestError: an unknown adapter, or a weight that is not a number. Others as `Model.load_adapter`.
        """
        folders, wanted = self.access.adapter_folders(loaded.folder), []
        for text in chosen:
            name, weight = _name_and_weight(text, folders)
            wanted.append((name, weight))
        missing = [name for name, _ in wanted if name not in loaded.model.adapters]
        if missing:
            with loaded.engine.exclusive():
                for name in missing:
                    if name not in loaded.model.adapters:  # somebody else may have wanted it meanwhile
                        loaded.model.load_adapter(folders[name], name)
        return wanted

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One model is loaded or rescaled at a time."""
        if not self._loading.acquire(blocking=False):
            raise RequestError("another model is being loaded at this moment: wait until it is ready")
        try:
            yield
        finally:
            self._loading.release()

    def _put(self, loaded: Loaded | None, instead_of: Loaded | None = None) -> None:
        """New requests get it from now on. instead_of: only while this is the model that they get."""
        with self._placing:
            if instead_of is not None and self._loaded is not instead_of:
                raise RequestError("the model was unloaded meanwhile")
            self._generation += 1
            self._loaded = loaded

    def _engine(self, model: Model, tokenizer: Tokenizer, speculation: str, draft: Path | None) -> Engine:
        kind = None if speculation == SPECULATION.default else speculation
        try:
            return Engine(
                model,
                tokenizer,
                max_running=self._max_running,
                draft_model=draft,
                speculation=kind,
                kept_folder=self.kept_folder,
            )
        except RopewalkError as error:
            if draft is None:
                raise
            raise FieldError("draft_model", str(error)) from error

    def _options(
        self, name: str, values: Mapping[str, Any], fetch: bool = False
    ) -> tuple[Path, LoadSettings, LoadOptions]:
        settings = read_settings(values)
        try:
            folder = self.access.open(name, fetch)
            options = load_options(settings, checkpoint_settings(folder))
        except FieldError:
            raise
        except RopewalkError as error:
            raise FieldError(FOLDER, str(error)) from error
        if options.second_folder is not None:
            try:
                options = replace(options, second_folder=self.access.open(options.second_folder, fetch))
            except RopewalkError as error:
                raise FieldError("second_folder", str(error)) from error
        return folder, settings, options

    def _info(self, folder: Path, options: LoadOptions) -> ModelInfo:
        try:
            choose_backend(options)  # options that contradict each other
            return model_info(folder, options=options)
        except RopewalkError as error:
            raise _of_field(error) from error

    def _check_memory(self, info: ModelInfo, options: LoadOptions) -> None:
        """Whether there is room beside the model that is loaded; a card says for itself what does not fit."""
        free = available_bytes() if choose_backend(options).name != "gpu" else None
        if free is not None and self._loaded is not None and info.weight_bytes > free:
            raise FieldError(
                FOLDER,
                f"its weights take {format_bytes(info.weight_bytes)}, and {format_bytes(free)} are free beside the "
                "model that is loaded: unload that one first",
            )

    def _draft_folder(self, settings: LoadSettings) -> Path | None:
        """The folder of the model that guesses.

        Raises:
            FieldError: it may not be read, or is missing or of no use with the way of guessing.
        """
        if settings.speculation != "draft":
            if settings.draft_model:
                raise FieldError("draft_model", "only speculation by draft needs one: empty this, or choose draft")
            return None
        if not settings.draft_model:
            raise FieldError("draft_model", "name the folder of a smaller model with the same tokenizer")
        try:
            return self.access.open(settings.draft_model, fetch=True)
        except RopewalkError as error:
            raise FieldError("draft_model", str(error)) from error

    def _shown_name(self, name: str) -> str:
        return name.strip() or EMBEDDED


def _read(folder: Path, options: LoadOptions, progress: Progress | None) -> tuple[Model, Tokenizer]:
    try:
        tokenizer = load_tokenizer(folder)
        return load_model(folder, options=options, progress=progress), tokenizer
    except RopewalkError as error:
        raise _of_field(error) from error


def _rescaled(loaded: Loaded, settings: LoadSettings) -> Loaded:
    """What is loaded, as it is called after its RoPE has changed."""
    rope, now = loaded.model.rope, {name: getattr(settings, name) for name in RESCALED}
    about = {"rope": rope.describe(), "rope_decided_by": rope.decided_by, "rope_covers": rope.covers}
    info = replace(loaded.info, max_seq_len=loaded.model.max_seq_len, **about)
    return replace(loaded, settings=replace(loaded.settings, **now), info=info)


def _of_field(error: RopewalkError) -> FieldError:
    return FieldError(field_of(str(error)) or FOLDER, str(error))


def _name_and_weight(text: str, folders: Mapping[str, Path]) -> tuple[str, float]:
    if text in folders:
        return text, 1.0
    name, _, weight = text.rpartition(":")
    if name not in folders:
        raise RequestError(f"there is no adapter {text!r}; there are {', '.join(folders) or 'none'}")
    try:
        return name, float(weight)
    except ValueError as error:
        raise RequestError(f"adapter {text!r}: the weight after the colon must be a number") from error
