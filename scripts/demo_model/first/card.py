"""The card of the first embedded model (README.md of its folder), written from the numbers that the stages measured."""

from __future__ import annotations

from first.training import CONTEXT, VOCAB_SIZE, model_config

TEMPLATE = """# The first embedded model

A Llama of {parameters:.1f} million parameters, trained from nothing on the Python {python} standard library and quantised
to 4 bits. It is here so that everything in this project runs without a download. It writes text that looks like Python
and its documentation, and it babbles: nothing it says is knowledge. Do not use it for anything but trying the engine.

| | |
|---|---|
| architecture | Llama: {layers} layers, hidden size {hidden}, {heads} heads of {head_dim} ({kv_heads} key/value heads), feed-forward {intermediate}, tied embeddings, RoPE theta 10000 |
| context | {context} tokens, and trained on nothing longer, so that context extension has something to show |
| tokenizer | sentencepiece BPE, {vocab} pieces, byte fallback, split digits, spaces kept; `tokenizer.model` is its only form |
| quantisation | GPTQ by gptqmodel 7.7.0: 4-bit, groups of 32, act-order, symmetric, checkpoint format `gptq` (v1); embeddings and norms float16 |
| size | {size_mb:.1f} MB in this folder |

## Training

- Text: {training_characters:,} characters in {training_documents:,} documents: the library's sources and, once per epoch
  where the library comes twice, its tests; the language reference that `pydoc` shows; idlelib's help; the licence.
  SHA-256 of the training text: `{training_sha256}`.
- Held out: {held_out_characters:,} characters, one document in 50 by the hash of its path (list below). Of these,
  `held_out.txt` holds long library files: {sample_files}.
- {tokens:,} tokens ({epochs:.2f} epochs) in {steps:,} steps of {batch} x {context} tokens, {minutes:.0f} minutes on two CPU cores; Muon for
  the layers' matrices and AdamW for the rest, warm-up and cosine, bf16 autocast, seed {seed}.{note}

## Held-out perplexity

Blocks of {context} tokens that do not overlap, the first token of each not counted, float32 in transformers; the quantised
model with exactly dequantised weights. `ropewalk perplexity --compute exact --lengths {context} held_out.txt` gives the same.

| model | held_out.txt | bits per byte | all held-out text | bits per byte |
|---|---|---|---|---|
| float | {float_sample[perplexity]:.3f} | {float_sample[bits_per_byte]:.4f} | {float_all[perplexity]:.3f} | {float_all[bits_per_byte]:.4f} |
| GPTQ 4-bit | {gptq_sample[perplexity]:.3f} | {gptq_sample[bits_per_byte]:.4f} | {gptq_all[perplexity]:.3f} | {gptq_all[bits_per_byte]:.4f} |

Beyond the trained length, on the first 32,768 tokens of held_out.txt, the GPTQ model's perplexity by block length and
RoPE scaling (factor length / {context} for linear and yarn, 2 for dynamic NTK):

{length_table}

## Adapters

The folders in `adapters/` are LoRAs (rank 16, on q, k, v and o) that were trained on this model at 2,048 tokens, four
times its context, each under the RoPE scaling that its adapter_config.json notes: `linear-4`, `ntk-4`,
`dynamic-ntk` (windows of 512, 1,024 and 2,048 in turn), `ntk-by-parts-4`, `yarn-4` and, without scaling, `extrapolation`.
`ropewalk perplexity --adapter linear-4 --lengths 512,2048` shows what one does. They fit these weights alone: weights
made anew need LoRAs made anew, with `python -m superhot.experiment`.

## A sample

Temperature 0.6, top-p 0.9, after the prompt `{prompt}` and a line end:

```
{sample}
```

## Making it again

`python -m first.make` in `scripts/demo_model` runs every stage; its head lists the commands, with the separate environment that
gptqmodel wants. The text depends on the Python version and on whether its tests are installed; {python} with tests gave
this model. Times and rounding differ between machines, so the weights will not be bit-identical.

## Licence

The model and tokenizer carry the licence of this repository. `held_out.txt` is Python's own text, under `LICENSE-PYTHON.txt`.

## Held-out documents

{held_out_documents}
"""  # noqa: E501 (table rows cannot be broken)


def model_card(manifest: dict, training: dict, evaluation: dict, size_bytes: int, note: str) -> str:
    """The card's Markdown from manifest.json, training.json and evaluation.json; `note` ends the training section."""
    config = model_config()
    return TEMPLATE.format(
        **{key: manifest[key] for key in manifest if key != "held_out_documents"},
        **{key: training[key] for key in ("tokens", "steps", "minutes", "batch", "seed")},
        **{key: evaluation[key] for key in ("float_sample", "float_all", "gptq_sample", "gptq_all")},
        parameters=evaluation["parameters"] / 1e6,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        kv_heads=config.num_key_value_heads,
        intermediate=config.intermediate_size,
        context=CONTEXT,
        vocab=VOCAB_SIZE,
        size_mb=size_bytes / 1e6,
        note=f" {note}" if note else "",
        epochs=training["tokens"] / training["epoch_tokens"],
        sample_files=", ".join(f"`{path}`" for path in evaluation["sample_files"]),
        length_table=_length_table(evaluation["by_length"]),
        prompt=evaluation["prompt"].strip(),
        sample=evaluation["sample"].strip("\n"),
        held_out_documents=", ".join(f"`{path}`" for path in manifest["held_out_documents"]),
    )


def _length_table(by_length: dict[str, dict[str, float]]) -> str:
    lengths = list(by_length["none"])
    lines = ["| RoPE | " + " | ".join(lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for method, row in by_length.items():
        lines.append(f"| {method} | " + " | ".join(f"{row[length]:.2f}" for length in lengths) + " |")
    return "\n".join(lines)
