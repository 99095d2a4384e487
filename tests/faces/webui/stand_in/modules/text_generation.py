import modules.shared as shared
import torch


def encode(prompt):
    if not shared.args.cpu:
        raise RuntimeError("no such device: cuda")
    return torch.tensor([prompt])


def generate_reply(token_ids, state):
    yield from generate_reply_HF(token_ids, state)


def generate_reply_HF(token_ids, state):
    output = shared.model.generate(input_ids=encode(token_ids), max_new_tokens=state["max_new_tokens"], do_sample=False)
    yield output[0].tolist()
