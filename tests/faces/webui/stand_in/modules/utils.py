from pathlib import Path

from modules import shared


def resolve_model_path(name):
    return Path(name) if Path(name).exists() else Path(f"{shared.args.model_dir}/{name}")
