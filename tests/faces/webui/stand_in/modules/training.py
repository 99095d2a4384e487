from modules.models import reload_model  # noqa: F401  (held by name, as there)


def do_train(lora_name):
    yield "Preparing the input..."
    yield f"trained {lora_name}"
