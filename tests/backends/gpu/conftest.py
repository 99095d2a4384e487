"""What the tests of the GPU backend need of Triton's interpreter."""

from __future__ import annotations

import pytest

from triton_interpreter import INTERPRETED


@pytest.fixture(autouse=True, scope="session")
def products_are_summed_exactly() -> None:
    """As the backend asks for; tests of kernels make no backend."""
    if INTERPRETED:
        from ropewalk.backends.gpu.interpreter import sum_products_exactly

        sum_products_exactly()
