from pathlib import Path

import modules.shared as shared


def add_lora_to_model(lora_names):
    add_lora_transformers(lora_names)


def get_lora_path(lora_name):
    return Path(f"{shared.args.lora_dir}/{lora_name}")


def add_lora_transformers(lora_names):
    raise RuntimeError("PEFT cannot wrap this")
