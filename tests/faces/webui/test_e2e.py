"""A real text-generation-webui with our loader, where one is at hand: see scripts/webui/e2e.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WEBUI = os.environ.get("TEXTGEN_WEBUI_DIR")
PYTHON = os.environ.get("TEXTGEN_WEBUI_PYTHON", sys.executable)


@pytest.mark.skipif(WEBUI is None, reason="TEXTGEN_WEBUI_DIR names no text-generation-webui to drive")
def test_a_real_web_ui_does_everything_with_our_loader():
    script = [sys.executable, str(ROOT / "scripts" / "webui" / "e2e.py"), "--python", PYTHON]
    done = subprocess.run(script, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
