from modules import loaders, shared
from modules.LoRA import add_lora_to_model
from modules.models import load_model, unload_model
from modules.models_settings import get_model_metadata, update_model_parameters


def _load_model(data):
    unload_model()
    settings = get_model_metadata(data["model_name"])
    allowed = set(loaders.list_model_elements())
    for name in allowed:
        if hasattr(shared.original_args, name):
            setattr(shared.args, name, getattr(shared.original_args, name))
    update_model_parameters(settings)
    for name, value in (data.get("args") or {}).items():
        if name in allowed and hasattr(shared.args, name):
            setattr(shared.args, name, value)
    shared.model, shared.tokenizer = load_model(data["model_name"])


def load_loras(lora_names):
    add_lora_to_model(lora_names)
