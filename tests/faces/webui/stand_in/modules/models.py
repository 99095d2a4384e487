import modules.shared as shared
from modules.logging_colors import logger
from modules.models_settings import get_model_metadata


def load_model(model_name, loader=None):
    shared.model_name = model_name
    load_functions = {"llama.cpp": llama_cpp_server_loader, "Transformers": transformers_loader}
    metadata = get_model_metadata(model_name)
    loader = loader or shared.args.loader or metadata["loader"]
    shared.args.loader = loader
    if shared.args.ctx_size == 0:
        shared.args.ctx_size = 8192
    model = load_functions[loader](model_name)
    from modules.transformers_loader import load_tokenizer

    tokenizer = load_tokenizer(model_name)
    shared.settings.update({name: value for name, value in metadata.items() if name in shared.settings})
    logger.info(f'LOADER: "{loader}"')
    return model, tokenizer


def transformers_loader(model_name):
    from modules.transformers_loader import load_model_HF

    return load_model_HF(model_name)


def llama_cpp_server_loader(model_name):
    raise RuntimeError(f"no gguf file in {model_name}")


def unload_model(keep_model_name=False):
    if shared.model is None:
        return
    shared.model = shared.tokenizer = None
    shared.lora_names = []
    if not keep_model_name:
        shared.model_name = "None"


def reload_model():
    unload_model()
    shared.model, shared.tokenizer = load_model(shared.model_name)
