"""transformers' `generate` on our model: every way of choosing tokens, assistants, guidance, streamers, threads."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, TextStreamer

from gptq_writer import write_checkpoint
from hf_checkpoint import EXACT, V, checkpoint, fresh_logits, ours, theirs, tokens
from ropewalk.base.errors import ConfigError, RequestError, UnsupportedError
from ropewalk.generate.generate import Generation
from ropewalk.generate.pace import Pace
from ropewalk.generate.sampling import SamplingParams
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.hf import RopewalkForCausalLM, TokenHistory, from_pretrained
from ropewalk.model.step import run_step
from tokenizer_writer import write_sentencepiece

GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}

LOOKUP = {"prompt_lookup_num_tokens": 4, "eos_token_id": 127}  # transformers before 5.7 fails here without an end token


@pytest.fixture(scope="module")
def model() -> RopewalkForCausalLM:
    return ours()


def reply(model: torch.nn.Module, prompt: torch.Tensor, **options) -> list[int]:
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY | options)[0].tolist()


class Letters:
    """A tokenizer for streamers: one character for each token."""

    def decode(self, ids, **options) -> str:
        return "".join(chr(0x100 + int(token)) for token in ids)

    def text(self, ids: list[int]) -> str:
        return self.decode(ids)


def test_greedy_text_is_that_of_our_own_loop(model) -> None:
    prompt = tokens(17)
    params = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
    with Scheduler(model.ropewalk_model).open(prompt[0].tolist()) as sequence:
        ids = [step.token_id for step in Generation(sequence, params)]
    assert reply(model, prompt)[17:] == ids


ALIKE = {
    "plain": {},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeated ngrams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[token] for token in range(3, 90, 2)]},
    "suppressed tokens": {"suppress_tokens": list(range(0, 128, 3))},
    "sequence bias": {"sequence_bias": {(5,): 3.0, (7, 9): 4.0}},
    "least and forced length": {"min_new_tokens": 8, "eos_token_id": 77, "forced_eos_token_id": 77},
    "guidance": {"guidance_scale": 1.7},
    "guidance by a negative prompt": {"guidance_scale": 1.5, "negative_prompt_ids": tokens(6, seed=8)},
    "guidance without a cache": {"guidance_scale": 1.5, "use_cache": False},
    "prompt lookup": LOOKUP,
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", ALIKE)
def test_tokens_are_those_that_transformers_own_model_chooses(model, way: str) -> None:
    prompt = tokens(12, seed=4).repeat(1, 2)  # something to look up
    assert reply(model, prompt, **ALIKE[way]) == reply(theirs(), prompt, **ALIKE[way])


SAMPLERS = {
    "temperature": {"temperature": 1.4},
    "top k": {"top_k": 5},
    "top p": {"top_p": 0.6, "top_k": 0},
    "min p": {"min_p": 0.1, "top_k": 0},
    "typical": {"typical_p": 0.5, "top_k": 0},
    "epsilon": {"epsilon_cutoff": 1e-2, "top_k": 0},
    "eta": {"eta_cutoff": 1e-2, "top_k": 0},
    "renormalised": {"top_p": 0.7, "renormalize_logits": True},
    "allowed tokens": {"prefix_allowed_tokens_fn": lambda batch, ids: [3, 4, 5, 60, 61]},
    "own processor": {"logits_processor": LogitsProcessorList([lambda ids, scores: scores.roll(1, dims=-1)])},
    "guidance": {"guidance_scale": 1.3},
    "prompt lookup": LOOKUP,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_is_repeatable_and_does_not_depend_on_what_is_cached(sampler: str) -> None:
    prompt, options = tokens(10, seed=6), {"do_sample": True, **SAMPLERS[sampler]}

    def run(model: RopewalkForCausalLM) -> list[int]:
        torch.manual_seed(11)
        return reply(model, prompt, **options)

    used = ours()
    reply(used, torch.cat([prompt[:, :7], tokens(9, seed=7)], dim=1))
    first = run(used)
    assert len(first) == 34 and first == run(used) == run(ours())


@pytest.mark.parametrize("assistant", ["ours", "theirs", "another of ours"])
def test_an_assistant_changes_no_token(model, assistant: str) -> None:
    helper = {
        "ours": lambda: ours(),
        "theirs": theirs,
        "another of ours": lambda: ours(layer_order="0"),
    }[assistant]()
    expected = reply(model, tokens(15))
    assert reply(model, tokens(15), assistant_model=helper) == expected
    assert reply(model, tokens(15), assistant_model=helper) == expected


def test_our_model_assists_that_of_transformers(model) -> None:
    assert reply(theirs(), tokens(15), assistant_model=model) == reply(theirs(), tokens(15))


def test_scores_and_logits_are_returned_on_request(model) -> None:
    prompt = tokens(9)
    out = model.generate(prompt, **GREEDY, return_dict_in_generate=True, output_logits=True, output_scores=True)
    whole = fresh_logits(model.ropewalk_model, out.sequences[0].tolist())
    assert torch.equal(torch.cat(out.logits), whole[8:-1])
    assert torch.equal(torch.cat(out.scores), whole[8:-1])
    assert isinstance(out.past_key_values, TokenHistory)


def test_a_returned_history_continues_the_conversation_even_after_an_edit(model) -> None:
    out = model.generate(tokens(20), **GREEDY, return_dict_in_generate=True)
    for prompt in (torch.cat([out.sequences, tokens(4, seed=2)], dim=1), tokens(25, seed=0), out.sequences[:, :9]):
        assert reply(model, prompt, past_key_values=out.past_key_values) == reply(ours(), prompt)


def test_end_tokens_end_a_reply(model) -> None:
    prompt = tokens(12)
    free = reply(model, prompt)
    end = free[20]
    stopped = reply(model, prompt, eos_token_id=end)
    assert stopped == free[: free.index(end, 12) + 1]


def test_stopping_criteria_are_asked_after_every_token(model) -> None:
    class AtLength(StoppingCriteria):
        def __call__(self, input_ids, scores, **options):
            return torch.full((1,), input_ids.shape[1] >= 18)

    stopped = reply(model, tokens(12), stopping_criteria=StoppingCriteriaList([AtLength()]))
    assert stopped == reply(model, tokens(12))[:18]


def test_streamers_get_every_token(model, capsys) -> None:
    expected = Letters().text(reply(model, tokens(12))[12:])
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=60)
    thread = threading.Thread(target=reply, args=(model, tokens(12)), kwargs={"streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()
    reply(model, tokens(12), streamer=TextStreamer(Letters(), skip_prompt=True))
    assert capsys.readouterr().out.strip() == expected


def test_statistics_say_what_was_reused_and_written() -> None:
    model, prompt = ours(), tokens(20)
    assert model.last_stats is None
    first = torch.tensor([reply(model, prompt)])
    stats = model.last_stats
    assert (stats.prompt_tokens, stats.reused_tokens, stats.new_tokens) == (20, 0, 24)
    assert (stats.context_used, stats.context_size) == (43, 256)
    assert stats.prompt_s > 0 and stats.generation_s > 0
    reply(model, torch.cat([first, tokens(6, seed=1)], dim=1), max_new_tokens=5)
    stats = model.last_stats
    assert (stats.prompt_tokens, stats.reused_tokens, stats.new_tokens) == (50, 43, 5)
    model(tokens(3, seed=4))
    assert model.last_stats == stats, "calls outside generate are not replies"


@pytest.mark.parametrize("way", ["prompt lookup", "guidance", "no cache"])
def test_statistics_count_neither_guesses_nor_guidance(way: str) -> None:
    model, prompt = ours(), tokens(12, seed=4).repeat(1, 2)
    written = reply(model, prompt, **ALIKE[way])[24:]
    stats = model.last_stats
    assert len(written) > 10
    assert (stats.prompt_tokens, stats.reused_tokens, stats.new_tokens) == (24, 0, len(written))


def test_statistics_are_current_while_a_reply_is_written() -> None:
    model, seen = ours(), []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **options):
            seen.append(model.last_stats.new_tokens)
            return torch.zeros(1, dtype=torch.bool)

    reply(model, tokens(8), stopping_criteria=StoppingCriteriaList([Watch()]))
    assert seen == list(range(1, 25))


def test_guidance_and_conversation_each_keep_their_cache() -> None:
    model, prompt = ours(), tokens(40)
    reply(model, prompt, guidance_scale=1.5, negative_prompt_ids=tokens(30, seed=9))
    reused = []
    for _ in range(2):
        reply(model, prompt, guidance_scale=1.5, negative_prompt_ids=tokens(30, seed=9))
        reused.append(model.last_stats.reused_tokens)
    assert reused == [39, 39]


def test_replies_of_several_threads_do_not_mix() -> None:
    model = ours()
    prompts = [tokens(30, seed=seed) for seed in range(4)]
    expected = [reply(model, prompt) for prompt in prompts]
    rows = fresh_logits(model.ropewalk_model, tokens(20, seed=50)[0].tolist())
    results: dict[int, list[list[int]]] = {number: [] for number in range(4)}
    wrong: list[str] = []
    done = threading.Event()

    def write(number: int) -> None:
        for _ in range(3):
            results[number].append(reply(model, prompts[number], guidance_scale=1.0 + 0.5 * (number % 2)))

    def look() -> None:
        while not done.is_set():
            if not torch.equal(model(tokens(20, seed=50)).logits[0], rows):
                wrong.append("logits")

    guided = [reply(model, prompt, guidance_scale=1.5) for prompt in prompts]
    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    looker = threading.Thread(target=look)
    for thread in (*threads, looker):
        thread.start()
    for thread in threads:
        thread.join(120)
    done.set()
    looker.join(120)
    assert not wrong
    assert results == {number: [guided[number] if number % 2 else expected[number]] * 3 for number in range(4)}


def test_replies_of_several_threads_share_their_steps_and_read_each_prompt_once(monkeypatch) -> None:
    model = ours()
    prompts = [tokens(60, seed=seed) for seed in (1, 2, 3)]
    expected = [reply(ours(), prompt) for prompt in prompts]
    steps, real = [], run_step
    monkeypatch.setattr(
        "ropewalk.model.model.run_step", lambda *args, **options: steps.append(args[1]) or real(*args, **options)
    )
    start, written = threading.Barrier(3), {}

    def write(number: int) -> None:
        start.wait()
        written[number] = reply(model, prompts[number])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert written == dict(enumerate(expected))
    assert sum(len(span.token_ids) for spans in steps for span in spans) == 3 * (60 + 23)
    assert any(len(spans) > 1 for spans in steps) and len(steps) < 3 * 24


def test_what_a_reply_computed_is_kept_for_others_and_held_by_nobody() -> None:
    model = ours()
    reply(model, tokens(100))
    used, shared = model.ropewalk_model.cache_used, model.ropewalk_model.cache_shared
    assert used == shared > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The usual model, with the tokenizer that a draft model's is compared with."""
    made = tmp_path_factory.mktemp("speculation") / "tiny"
    shutil.copytree(checkpoint()[0], made)
    return write_sentencepiece(made)


@pytest.fixture
def eager(monkeypatch) -> None:
    """Guesses are made at every step, whether they pay or not."""
    monkeypatch.setattr(Pace, "wanted", lambda pace, num_others: 3)


def guessing(folder: Path, speculation: str) -> RopewalkForCausalLM:
    """A model that guesses ahead; its draft model is the same, so it is always right."""
    draft = folder if speculation == "draft" else None
    return from_pretrained(folder, speculation, draft, **EXACT)


@pytest.mark.parametrize("speculation", ["ngram", "draft"])
@pytest.mark.parametrize("way", ["plain", "guidance", "prompt lookup", "no cache", "repetition penalty"])
def test_guessing_ahead_changes_no_token(model, folder: Path, eager, speculation: str, way: str) -> None:
    ahead = guessing(folder, speculation)
    for prompt in (tokens(12, seed=4).repeat(1, 2), tokens(30)):
        assert reply(ahead, prompt, **ALIKE[way]) == reply(model, prompt, **ALIKE[way])


def test_guesses_come_true_and_are_counted_and_leave_nothing_wrong_behind(
    model, folder: Path, eager, monkeypatch
) -> None:
    ahead, prompt = guessing(folder, "draft"), tokens(24)
    steps, real = [], run_step
    monkeypatch.setattr(
        "ropewalk.model.model.run_step", lambda *args, **kw: steps.append(args[:2]) or real(*args, **kw)
    )
    written = reply(ahead, prompt, max_new_tokens=60)
    monkeypatch.setattr("ropewalk.model.model.run_step", real)
    assert written == reply(model, prompt, max_new_tokens=60)
    stats = ahead.last_stats
    assert stats.new_tokens == 60 and 40 <= stats.accepted_tokens <= stats.guessed_tokens
    assert sum(target is ahead.ropewalk_model for target, _ in steps) < 40
    longer = torch.tensor([[*written, 5, 6, 7]])
    assert reply(ahead, longer) == reply(model, longer)
    assert ahead.last_stats.reused_tokens == len(written) - 1


@pytest.mark.parametrize("speculation", ["ngram", "draft"])
def test_a_seed_gives_the_same_text_with_and_without_guesses(model, folder: Path, eager, speculation: str) -> None:
    prompt, options = tokens(12, seed=4).repeat(1, 3), {"do_sample": True, "temperature": 0.7, "max_new_tokens": 60}
    texts = []
    for one in (model, guessing(folder, speculation)):
        torch.manual_seed(3)
        texts.append(reply(one, prompt, **options))
    assert texts[0] == texts[1]


def test_an_edit_while_guesses_are_ahead_is_followed(model, folder: Path, eager) -> None:
    ahead = guessing(folder, "draft")
    out = ahead.generate(tokens(20), **GREEDY, return_dict_in_generate=True)
    for prompt in (out.sequences[:, :30], torch.cat([out.sequences[:, :25], tokens(4, seed=2)], dim=1)):
        assert reply(ahead, prompt, past_key_values=out.past_key_values) == reply(model, prompt)


def test_a_draft_model_of_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"vocab_size": 120})
    with pytest.raises(ConfigError, match="draft_model: .* knows 120 tokens"):
        from_pretrained(folder, draft_model=write_sentencepiece(tmp_path), **EXACT)


def test_a_reply_that_fails_leaves_the_next_one_unharmed() -> None:
    model = ours()
    expected = reply(model, tokens(12))

    def fail(ids, scores):
        raise RuntimeError("a broken processor")

    with pytest.raises(RuntimeError, match="a broken processor"):
        reply(model, tokens(12), logits_processor=LogitsProcessorList([fail]))
    model.watch(cancelled=lambda: True)
    with pytest.raises(RequestError, match="cancelled"):
        reply(model, tokens(12, seed=3))
    model.watch()
    assert reply(model, tokens(12)) == expected


@pytest.mark.skipif(
    not hasattr(transformers.GenerationConfig(), "prefill_chunk_size"), reason="this transformers has no such option"
)
def test_chunked_prefill_is_ours_whatever_is_asked(model) -> None:
    assert reply(model, tokens(30), prefill_chunk_size=7) == reply(model, tokens(30))


REFUSED = {
    "beams": ({"num_beams": 2}, "num_beams=2: only one sequence"),
    "sequences": ({"num_return_sequences": 3, "do_sample": True}, "num_return_sequences=3: only one sequence"),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states is not"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is not"),
    "static cache": ({"cache_implementation": "static"}, "brings its own cache"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ways_to_generate_that_are_not_there_are_refused(model, case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(UnsupportedError, match=message):
        reply(model, tokens(5), **options)


def test_several_sequences_and_padding_are_refused(model) -> None:
    with pytest.raises(UnsupportedError, match="holds 2 sequences"):
        reply(model, tokens(10).view(2, 5))
    with pytest.raises(UnsupportedError, match="attention_mask hides 2 tokens"):
        model.generate(tokens(5), attention_mask=torch.tensor([[0, 0, 1, 1, 1]]), **GREEDY)


def test_keys_and_values_of_another_model_are_refused(model) -> None:
    with pytest.raises(RequestError, match="what an earlier call of this model returned, got DynamicCache"):
        reply(model, tokens(5), past_key_values=transformers.DynamicCache())


def test_a_typing_error_in_an_option_is_told(model) -> None:
    with pytest.raises(ValueError, match="max_new_tokenz"):
        reply(model, tokens(5), max_new_tokenz=3)


def test_a_reply_past_the_context_is_refused_and_the_model_goes_on(model) -> None:
    with pytest.raises(RequestError, match="max_seq_len of at least 257"):
        reply(model, tokens(250), max_new_tokens=20)
    assert len(reply(model, tokens(250), max_new_tokens=7)) == 257


def test_our_class_reads_as_a_causal_language_model(model) -> None:
    assert isinstance(model, transformers.PreTrainedModel) and model.can_generate()
    assert model.config.vocab_size == V and model.config.name_or_path == str(checkpoint()[0])
