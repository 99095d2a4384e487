import argparse
import copy
import sys

import yaml

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--lora", nargs="+")
parser.add_argument("--loader")
parser.add_argument("--model-dir", default="models")
parser.add_argument("--lora-dir", default="loras")
parser.add_argument("--extensions", nargs="+", default=[])
parser.add_argument("--cpu", action="store_true")
parser.add_argument("--ctx-size", "--max_seq_len", type=int, default=0)
parser.add_argument("--cache-type", "--cache_type", default="fp16")
parser.add_argument("--threads", type=int, default=0)
parser.add_argument("--no_use_fast", action="store_true")
args = parser.parse_args()
original_args = copy.deepcopy(args)
args_defaults = parser.parse_args([])
provided_arguments = [
    name for name in (argument.lstrip("-").replace("-", "_") for argument in sys.argv[1:]) if hasattr(args, name)
]

model = tokenizer = None
model_name = "None"
lora_names: list = []
generation_lock = None
gradio: dict = {}
settings = {"truncation_length": 8192, "instruction_template_str": ""}


def fix_loader_name(name):
    known = {"transformers": "Transformers", "llama.cpp": "llama.cpp"}
    return known.get(name.lower()) if name else name


def load_user_config():
    try:
        with open(f"{args.model_dir}/config-user.yaml") as file:
            return yaml.safe_load(file) or {}
    except FileNotFoundError:
        return {}


args.loader = fix_loader_name(args.loader)
user_config = load_user_config()
