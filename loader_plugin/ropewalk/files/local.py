"""The folder of a model that is given as a text: a path as it is, a name on the hub once it is downloaded."""

from __future__ import annotations

from pathlib import Path

from ropewalk.files.names import parse_name


def local_folder(model: str | Path, weights: bool = True) -> Path:
    """The folder of a model given as a text: a path as it is, a name downloaded if need be. A `Path` is only a path.

    weights: False leaves the weight files of a name where they are.

    Raises:
        CheckpointError: there is no such name, it may not be read, or the hub cannot be asked and the cache lacks it.
        UnsupportedError, ConfigError: what its small files say is refused, before the weights are downloaded.
    """
    if not isinstance(model, str):
        return model
    name = parse_name(model)
    if name is None:
        return Path(model)
    from ropewalk.files.hub import fetch_model  # huggingface_hub takes a while to import, and few need it

    return fetch_model(name, weights)
