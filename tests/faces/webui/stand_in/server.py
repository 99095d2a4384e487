"""Starts like the real one: the model of --model first, extensions and the page after. Then it says how things are."""

import json

from modules import extensions, shared
from modules.LoRA import add_lora_to_model
from modules.models import load_model
from modules.models_settings import get_model_metadata, update_model_parameters

if __name__ == "__main__":
    if shared.args.model is not None:
        update_model_parameters(get_model_metadata(shared.args.model), initial=True)
        shared.model, shared.tokenizer = load_model(shared.args.model)
        if shared.args.lora:
            add_lora_to_model(shared.args.lora)
    shared.generation_lock = object()
    extensions.load_extensions()
    from modules.loaders import loaders_and_params

    state = {
        "loader": shared.args.loader,
        "loaded": type(shared.model).__name__,
        "loras": shared.lora_names,
        "truncation_length": shared.settings["truncation_length"],
        "loaders": list(loaders_and_params),
        "provided": shared.provided_arguments,
    }
    print("STATE " + json.dumps(state))
