"""Other programs' kernels beside ours, for scripts/bench/gpu.py: those that are installed, by their public interfaces.

A peer that is missing, or fails, is a line that says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarking import paired, spread
from ropewalk.backends.gpu.activations import prepare
from ropewalk.backends.gpu.linear import pack
from ropewalk.gptq.linear import GptqLinear, sequential_groups

ROWS = (1, 4, 16, 64, 512, 2048)
GROUP = 128


def measure_products(device: torch.device, tiny: bool, rounds: int) -> None:
    """Seconds of one product, and bytes of weights read in them."""
    in_features, out_features = (256, 128) if tiny else (4096, 11008)
    print(f"\n## products of {in_features} x {out_features}, 4 bits in groups of {GROUP}, float16 activations")
    ours = pack([random_linear(in_features, out_features)], device, "fp16")
    for rows in ROWS[:1] if tiny else ROWS:
        x = torch.randn(rows, in_features, device=device)
        works = {"ropewalk": product_of_ours(ours, x)}
        for name, make in (("float16 of torch", float16_product), ("int4 of torch", int4_product)):
            try:
                works[name] = make(x.half(), out_features)
                works[name]()
            except (RuntimeError, AttributeError, NotImplementedError) as error:
                works.pop(name, None)
                print(f"{rows:5} rows  {name}: not measured: {' '.join(str(error).split())[:120]}")
        for name, times in paired(works, rounds).items():
            print(f"{rows:5} rows  {name:18} {spread([1e6 * seconds for seconds in times])} us")


def random_linear(in_features: int, out_features: int) -> GptqLinear:
    """A symmetric linear of random codes."""
    word, groups = torch.iinfo(torch.int32), in_features // GROUP
    return GptqLinear(
        name="random",
        bits=4,
        in_features=in_features,
        out_features=out_features,
        planar=False,
        qweight=torch.randint(word.min, word.max, (in_features // 8, out_features), dtype=torch.int32),
        scales=torch.full((groups, out_features), 0.01).half(),
        zeros=torch.full((groups, out_features), 8, dtype=torch.uint8),
        group_starts=sequential_groups(in_features, GROUP),
        order=None,
        bias=None,
    )


def product_of_ours(weight: object, x: torch.Tensor) -> Callable[[], object]:
    """Ours, with the activations ready, as they are in a layer."""
    inputs = [prepare(x, order) for order in weight.orders]
    y = torch.empty(len(x), weight.out_features, device=x.device)

    def work() -> None:
        weight.run_(inputs, y)
        wait(x.device)

    return work


def float16_product(x: torch.Tensor, out_features: int) -> Callable[[], object]:
    """Weights in float16: four times the bytes."""
    weight = torch.randn(x.shape[1], out_features, device=x.device).half()

    def work() -> None:
        x @ weight
        wait(x.device)

    return work


def int4_product(x: torch.Tensor, out_features: int) -> Callable[[], object]:
    """torch's own product with 4-bit weights (tinygemm), in bfloat16 as it wants it."""
    in_features = x.shape[1]
    codes = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8, device=x.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.ones(in_features // GROUP, out_features, 2, dtype=torch.bfloat16, device=x.device)
    rows = x.bfloat16()

    def work() -> None:
        torch.ops.aten._weight_int4pack_mm(rows, packed, GROUP, scales)
        wait(x.device)

    return work


def wait(device: torch.device) -> None:
    """For the card."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_peers(folder: Path, tokens: int) -> None:
    """Tokens/s of one sequence by other programs that load the same folder."""
    print(f"\n## {folder.name} by other programs")
    for name, run in (("gptqmodel", run_gptqmodel), ("vLLM", run_vllm)):
        try:
            print(f"{name}: {run(folder, tokens):.1f} tokens/s")
        except Exception as error:  # another program's: whatever it raises, the others are measured
            print(f"{name}: not measured: {type(error).__name__}: {' '.join(str(error).split())[:160]}")


def run_gptqmodel(folder: Path, tokens: int) -> float:
    """Decode with the kernel that gptqmodel chooses."""
    from gptqmodel import GPTQModel

    model = GPTQModel.load(str(folder), device="cuda")
    prompt = torch.arange(300, 428, device="cuda")[None]

    def generate(count: int) -> float:
        started = time.perf_counter()
        model.generate(input_ids=prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    return rate(generate, tokens)


def run_vllm(folder: Path, tokens: int) -> float:
    """Decode with vLLM, which takes Marlin where it can."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=str(folder), gpu_memory_utilization=0.5, max_model_len=1024, skip_tokenizer_init=True)

    def generate(count: int) -> float:
        params = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0, detokenize=False)
        started = time.perf_counter()
        engine.generate({"prompt_token_ids": list(range(300, 428))}, params)
        return time.perf_counter() - started

    return rate(generate, tokens)


def rate(generate: Callable[[int], float], tokens: int) -> float:
    """Tokens/s without what a reply of one token takes: prompt and start."""
    generate(tokens)
    short = min(generate(1) for _ in range(3))
    return (tokens - 1) / (min(generate(tokens) for _ in range(3)) - short)
