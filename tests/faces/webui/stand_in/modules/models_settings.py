import json
import re
from pathlib import Path

import yaml
from modules import loaders, shared
from modules.utils import resolve_model_path


def get_model_metadata(model):
    settings = {"ctx_size": 8192, "truncation_length": 8192, "truncation_length_info": 8192}
    config = resolve_model_path(model) / "config.json"
    declared = json.loads(config.read_text()) if config.exists() else {}
    method = declared.get("quantization_config", {}).get("quant_method")
    settings["loader"] = infer_loader(model, settings, hf_quant_method=method)
    if "max_position_embeddings" in declared:
        settings["truncation_length"] = settings["truncation_length_info"] = declared["max_position_embeddings"]
        settings["ctx_size"] = min(declared["max_position_embeddings"], 8192)
    for pattern, saved in shared.user_config.items():
        if re.match(pattern.lower(), Path(model).name.lower()):
            settings.update(saved)
    return settings


def infer_loader(model_name, model_settings, hf_quant_method=None):
    path = resolve_model_path(model_name)
    if not path.exists():
        return None
    return "llama.cpp" if list(path.glob("*.gguf")) else "Transformers"


def update_model_parameters(state, initial=False):
    for element in loaders.list_model_elements():
        if element in state and not (initial and element in shared.provided_arguments):
            setattr(shared.args, element, state[element])


def save_model_settings(model, state):
    config = shared.load_user_config()
    saved = config.setdefault(Path(model).name + "$", {})
    for name in loaders.list_model_elements():
        if name == "loader" or name in loaders.loaders_and_params[state["loader"]]:
            saved[name] = state[name]
    shared.user_config = config
    Path(f"{shared.args.model_dir}/config-user.yaml").write_text(yaml.dump(config, sort_keys=False))
