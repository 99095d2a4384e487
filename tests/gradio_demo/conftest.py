"""What the tests of the page's behaviour can ask for."""

from __future__ import annotations

import pytest

from demo_session import embedded_session
from ropewalk.gradio_demo.session import Session


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """For tests that leave the model as it is."""
    return embedded_session(tmp_path_factory.mktemp("session"))
