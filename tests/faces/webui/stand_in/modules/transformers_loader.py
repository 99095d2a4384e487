def load_model_HF(model_name):
    raise ImportError("Loading a GPTQ quantized model requires optimum")


def load_tokenizer(model_name):
    return f"tokenizer of {model_name}"
