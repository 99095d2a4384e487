import functools

loaders_and_params = {
    "llama.cpp": ["threads", "ctx_size", "cache_type"],
    "Transformers": ["cpu", "no_use_fast"],
    "ExLlamav3_HF": ["ctx_size", "cache_type", "no_use_fast"],
}
loaders_samplers = {
    "llama.cpp": {"temperature"},
    "Transformers": {"temperature", "top_p", "penalty_alpha", "prompt_lookup_num_tokens"},
    "ExLlamav3_HF": {"temperature", "top_p"},
}


@functools.cache
def list_all_samplers():
    return sorted({name for names in loaders_samplers.values() for name in names})


@functools.cache
def get_all_params():
    return sorted({name for names in loaders_and_params.values() for name in names})


@functools.cache
def list_model_elements():
    return ["loader", "threads", "ctx_size", "cache_type", "cpu", "no_use_fast"]
