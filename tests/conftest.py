"""What every test module can ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fixtures import gptq_fixture_folders

# Models of 64 features gain nothing from more, and on busy cores torch's threads wait for each other: 30 times slower.
torch.set_num_threads(1)


@pytest.fixture(params=gptq_fixture_folders(), ids=lambda folder: folder.name)
def gptq_fixture(request: pytest.FixtureRequest) -> Path:
    """One checkpoint folder with its expected.npz, for each there is."""
    return request.param
