import importlib.util
from pathlib import Path

from modules import shared


def load_extensions():
    for name in shared.args.extensions:
        path = Path("user_data/extensions") / name / "script.py"
        spec = importlib.util.spec_from_file_location(f"user_ext_{name}", path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
