import modules.shared as shared
import torch


def encode(prompt):
    if not shared.args.cpu:
        raise RuntimeError("no such device: cuda")
    return torch.tensor([prompt])


def decode(output_ids, skip_special_tokens=True):
    return shared.tokenizer.decode(output_ids, skip_special_tokens=skip_special_tokens)


def get_reply_from_output_ids(output_ids, state=None, starting_from=0):
    reply = decode(output_ids[starting_from:], state["skip_special_tokens"] if state else True)
    if len(output_ids) <= starting_from or reply.startswith(" "):  # the tokenizer drops one space, of however many
        return reply
    first = shared.tokenizer.convert_ids_to_tokens(int(output_ids[starting_from]))
    return " " + reply if first.startswith("▁") else reply


def generate_reply(token_ids, state):
    yield from generate_reply_HF(token_ids, state)


def generate_reply_HF(token_ids, state):
    output = shared.model.generate(input_ids=encode(token_ids), max_new_tokens=state["max_new_tokens"], do_sample=False)
    yield output[0].tolist()
