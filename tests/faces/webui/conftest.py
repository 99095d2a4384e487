"""The stand-in of the web UI, running with our hooks, for the tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from webui_support import make_folders, running_webui, start


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("webui"))


@pytest.fixture(params=[False, True], ids=["launcher", "extension"])
def webui(root: Path, request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """The stand-in with the hooks, whether we came first or last; no model is loaded."""
    with running_webui(root, late=request.param) as modules:
        start(modules)
        yield modules


@pytest.fixture
def loaded(webui: SimpleNamespace) -> SimpleNamespace:
    webui.api_models._load_model({"model_name": "demo", "args": {"ctx_size": 256}})
    return webui
