import traceback

import gradio as gr
from modules import loaders, shared, ui
from modules.LoRA import add_lora_to_model
from modules.models import load_model, unload_model
from modules.models_settings import get_model_metadata


def create_ui():
    with gr.Row():
        with gr.Column() as main:
            shared.gradio["loader"] = gr.Dropdown(choices=list(loaders.loaders_and_params))
            with gr.Row():
                shared.gradio["ctx_size"] = gr.Slider(value=shared.args.ctx_size)
                shared.gradio["cache_type"] = gr.Dropdown(choices=["fp16", "q4_0"])
        with gr.Column():
            shared.gradio["threads"] = gr.Slider(value=shared.args.threads)
            shared.gradio["cpu"] = gr.Textbox()
            shared.gradio["no_use_fast"] = gr.Textbox()
    shared.gradio["main"] = main


def create_event_handlers():
    """Look every setting up by name, as the real one does to connect its events."""
    shown = [shared.gradio[name] for name in loaders.get_all_params()]
    gathered = [shared.gradio[name] for name in ui.list_interface_input_elements() if name != "temperature"]
    return shown, gathered


def load_model_wrapper(selected_model, loader, autoload=False):
    settings = get_model_metadata(selected_model)
    if not autoload:
        yield f"### {selected_model}\n\n- Max sequence length: {settings['truncation_length_info']}"
        return
    try:
        yield f"Loading `{selected_model}`..."
        unload_model()
        shared.model, shared.tokenizer = load_model(selected_model, loader)
        yield f"Successfully loaded `{selected_model}`."
    except Exception:
        yield traceback.format_exc()


def load_lora_wrapper(selected_loras):
    yield f"Applying {selected_loras}"
    add_lora_to_model(selected_loras)
    yield "Successfully applied the LoRAs"


def update_truncation_length(current_length, state):
    return state["ctx_size"] if state["loader"].lower().startswith("exllama") else current_length
