"""Checkpoints of many families against transformers on the same dequantised weights, for every variant there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixture_logits import check_bits, check_exact, check_int8
from fixtures import family_fixture_folders
from variants import Variant, variants

FOLDERS = family_fixture_folders()
each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
pytestmark = pytest.mark.skipif(not FOLDERS, reason="no fixtures of other families on this machine")


@each
@pytest.mark.parametrize("variant", variants(compute="exact"), ids=str)
def test_exact_logits_are_those_of_transformers(folder: Path, variant: Variant) -> None:
    check_exact(folder, variant)


@each
@pytest.mark.parametrize("variant", variants(compute="int8"), ids=str)
def test_int8_logits_diverge_no_more_than_simulated(folder: Path, variant: Variant) -> None:
    check_int8(folder, variant)


@each
def test_chunks_and_batches_change_no_bit(folder: Path) -> None:
    check_bits(folder)
