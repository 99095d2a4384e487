"""backends/gpu/tiles.py: what a card can do decides which products are taken."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ropewalk.backends.gpu.tiles import has_tf32

CARD = torch.device("cuda", 0)


@pytest.mark.parametrize("arch, found", [("gfx942:sramecc+:xnack-", True), ("gfx1100", False), ("gfx1201", False)])
def test_cards_of_amd_have_tf32_from_the_mi300_on(monkeypatch: pytest.MonkeyPatch, arch: str, found: bool) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=arch))
    assert has_tf32(CARD) is found


def test_other_cards_and_the_interpreter_have_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert has_tf32(CARD) and has_tf32(torch.device("cpu"))
