from modules import loaders


def list_interface_input_elements():
    return ["temperature", *loaders.list_model_elements()]
