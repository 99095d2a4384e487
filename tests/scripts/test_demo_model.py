"""The embedded model's folder: complete, small, and what its card says."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import ropewalk
from ropewalk.config.model import load_model_config
from ropewalk.config.quantisation import load_quant_config
from ropewalk.files.folder import Checkpoint
from ropewalk.generate.evaluate import perplexity
from ropewalk.gptq.linear import read_gptq_linear

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "demo_model"))

from reading import evaluate  # noqa: E402
from reading.embed import GENERATION, MODEL_FILES  # noqa: E402
from reading.measure import ADAPTERS  # noqa: E402

FOLDER = Path(ropewalk.__file__).resolve().parent / "demo_model"
# Shares of exact answers that it must have on documents drawn anew, at SHORT tokens: below what the card says, above
# what a model has that was not trained to the end. New weights may move them, never noise: 240 questions have 3 points.
SHORT = 256
EXACT_ANSWERS, RIGHT_REFUSALS, MOST_FALSE_REFUSALS = 0.95, 0.9, 0.03
# Perplexity of code, of which it was trained on little, at four times its length: under YaRN over that without.
EXTENDED_RATIO = 0.95
MAX_BYTES = 10_000_000
BESIDE = ("generation_config.json", "held_out.txt", "LICENSE-PYTHON.txt", "README.md")
CODE = "class P:\n    def f(self, x=10):\n        self.x = x\n\n\tif True:  # caf\u00e9 \u2192 \U0001f600\n  pass   \n"


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))


@pytest.fixture(scope="module")
def card() -> str:
    return (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


def test_the_folder_stays_within_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= MAX_BYTES


def test_the_config_is_a_short_context_llama_quantised_to_four_bits(config: dict) -> None:
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 512
    quantisation = config["quantization_config"]
    assert (quantisation["bits"], quantisation["group_size"]) == (4, 32)
    assert quantisation["desc_act"] and quantisation["sym"]
    assert any(name.startswith("gptqmodel") for name in quantisation["meta"]["quantizer"])


def test_no_json_file_names_a_folder_of_the_machine_that_made_it() -> None:
    for path in FOLDER.glob("*.json"):
        assert not re.search(r'"/\w|"[A-Za-z]:\\', path.read_text(encoding="utf-8")), path.name


def test_the_weights_have_the_shapes_of_the_config_and_an_act_order(config: dict) -> None:
    with safe_open(FOLDER / "model.safetensors", "np") as file:
        names = set(file.keys())
        embeddings = file.get_slice("model.embed_tokens.weight").get_shape()
        down = "model.layers.0.mlp.down_proj."
        qweight = file.get_slice(down + "qweight").get_shape()
        group_of_row = file.get_tensor(down + "g_idx").tolist()
    assert embeddings == [config["vocab_size"], config["hidden_size"]]
    assert qweight == [config["intermediate_size"] // 8, config["hidden_size"]]
    assert group_of_row != sorted(group_of_row)
    assert f"model.layers.{config['num_hidden_layers'] - 1}.self_attn.q_proj.qweight" in names


def test_the_tokenizer_gives_python_code_back_unchanged(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    assert tokenizer.decode(tokenizer.encode(CODE)) == CODE
    held_out = (FOLDER / "held_out.txt").read_bytes().decode("utf-8")
    assert tokenizer.decode(tokenizer.encode(held_out)) == held_out


def test_the_tokenizer_keeps_an_indentation_in_one_piece(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    assert "\u2581" * 8 in tokenizer.encode("a\n        return", out_type=str)


def test_the_tokenizer_and_the_config_agree(tokenizer: sentencepiece.SentencePieceProcessor, config: dict) -> None:
    assert tokenizer.get_piece_size() == config["vocab_size"]
    assert (tokenizer.bos_id(), tokenizer.eos_id()) == (config["bos_token_id"], config["eos_token_id"])
    settings = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer.id_to_piece(tokenizer.bos_id()) == settings["bos_token"]
    assert tokenizer.id_to_piece(tokenizer.eos_id()) == settings["eos_token"]


def test_the_held_out_text_is_long_enough_for_long_context(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    data = (FOLDER / "held_out.txt").read_bytes()
    assert len(data) <= 200_000 + 100
    assert len(tokenizer.encode(data.decode("utf-8"))) >= 4 * 8192


def test_the_card_gives_the_perplexity_of_both_models_and_they_are_close(card: str) -> None:
    (found,) = re.findall(r"the float model has ([\d.]+), the GPTQ model ([\d.]+) in `exact`", card)
    unrounded, quantised = map(float, found)
    assert 1 < unrounded < quantised < 1.05 * unrounded


def test_no_file_of_another_model_is_left() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*MODEL_FILES, *BESIDE, "adapters", "tour"}
    assert {path.name for path in (FOLDER / "adapters").iterdir()} == set(ADAPTERS)


def test_the_generation_settings_are_greedy() -> None:
    settings = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    assert settings == GENERATION


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, float]]:
    """On documents that the card did not measure."""
    setting = evaluate.Setting(FOLDER, (SHORT,), side="names", documents=40, threads=1, seed=2)
    return evaluate.summary(evaluate.evaluate(setting))[str(SHORT)]


def test_it_answers_questions_about_texts_with_names_that_it_has_never_seen(answers: dict) -> None:
    assert answers["answered"]["share"] > EXACT_ANSWERS
    assert answers["kind absent"]["share"] > RIGHT_REFUSALS
    assert answers["false refusals"]["share"] < MOST_FALSE_REFUSALS


def test_what_the_card_says_of_answers_holds_for_documents_drawn_anew(answers: dict, card: str) -> None:
    (said,) = re.findall(r"^\| GPTQ, `int8` \| (\d+) ", card, re.M)
    found, count = answers["answered"]["share"], answers["answered"]["questions"]
    assert abs(found - int(said) / 100) < 4 * math.sqrt(0.25 / count)


def test_the_licence_of_the_held_out_text_is_beside_it() -> None:
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (FOLDER / "LICENSE-PYTHON.txt").read_text(encoding="utf-8")


SCORED_TOKENS = 16 * 512  # of held_out.txt: enough that int8 and float32 differ by rounding alone


@pytest.fixture(scope="module")
def held_out_ids() -> list[int]:
    return ropewalk.load_tokenizer(FOLDER).encode((FOLDER / "held_out.txt").read_text(encoding="utf-8"), add_bos=False)


def measured(compute: str, ids: list[int], length: int = 512, **rope: float) -> float:
    model = ropewalk.load_model(FOLDER, compute=compute, max_seq_len=length, threads=1, **rope)
    return perplexity(model, ids, [length], max_tokens=SCORED_TOKENS)[0].perplexity


@torch.inference_mode()
def perplexity_through_transformers(ids: list[int], length: int = 512) -> float:
    """The same windows through transformers, float32, on the dequantised weights."""
    config = LlamaConfig(**{k: v for k, v in json.loads((FOLDER / "config.json").read_text()).items() if k[0] != "q"})
    model = LlamaForCausalLM(config).eval()
    facts = load_model_config(FOLDER)
    quant = load_quant_config(FOLDER, facts.raw)
    state = {}
    with Checkpoint(FOLDER) as checkpoint:
        for name in checkpoint.names():
            module, kind = name.rsplit(".", 1)
            if kind == "weight":
                state[name] = checkpoint.tensor(name).float()
            elif kind == "qweight":
                shape = model.get_submodule(module).weight.shape
                linear = read_gptq_linear(checkpoint, module, shape[1], shape[0], quant.for_module(module))
                state[f"{module}.weight"] = linear.dequantise().T.contiguous()
    assert model.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]  # tied
    windows = torch.tensor(ids[: SCORED_TOKENS // length * length]).view(-1, length)
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]  # [windows, length - 1, V]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def test_exact_perplexity_is_that_of_transformers(held_out_ids: list[int]) -> None:
    assert measured("exact", held_out_ids) == pytest.approx(perplexity_through_transformers(held_out_ids), rel=1e-3)


def test_the_default_mode_costs_at_most_a_thousandth_of_perplexity(held_out_ids: list[int]) -> None:
    assert measured("int8", held_out_ids) <= 1.001 * measured("exact", held_out_ids)


def test_context_extension_shows_beyond_the_trained_length(held_out_ids: list[int]) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    plain = measured("int8", held_out_ids, 2048)
    assert measured("int8", held_out_ids, 2048, rope_scaling=yarn) < EXTENDED_RATIO * plain
