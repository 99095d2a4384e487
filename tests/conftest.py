"""What every test module can ask for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fixtures import gptq_fixture_folders

# Without a card, Triton's kernels run in its interpreter; Triton asks for this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Models of 64 features gain nothing from more, and on busy cores the threads of torch wait for each other.
torch.set_num_threads(1)


@pytest.fixture(params=gptq_fixture_folders(), ids=lambda folder: folder.name)
def gptq_fixture(request: pytest.FixtureRequest) -> Path:
    """One checkpoint folder with its expected.npz, for each there is."""
    return request.param


@pytest.fixture(autouse=True)
def our_logger_is_left_as_it_was() -> Iterator[None]:
    """A front end tells the package's logger where to write and how much; the next test has it untouched."""
    logger = logging.getLogger("ropewalk")
    level, handlers, propagate = logger.level, list(logger.handlers), logger.propagate
    yield
    logger.setLevel(level)
    logger.handlers, logger.propagate = handlers, propagate  # a list of its own: it may share that of the web UI
