"""The tokenizers that every test of the engine runs with."""

from __future__ import annotations

import pytest

from ropewalk.text.tokenizer.load import Tokenizer, load_tokenizer
from tokenizer_writer import WRITERS


@pytest.fixture(scope="module", params=WRITERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(WRITERS[request.param](tmp_path_factory.mktemp(request.param)))
