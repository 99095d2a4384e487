"""What every test module can ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures import gptq_fixture_folders


@pytest.fixture(params=gptq_fixture_folders(), ids=lambda folder: folder.name)
def gptq_fixture(request: pytest.FixtureRequest) -> Path:
    """One checkpoint folder with its expected.npz, for each there is."""
    return request.param
