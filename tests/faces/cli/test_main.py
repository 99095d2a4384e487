"""faces/cli: the commands, in this process where that is enough and from the outside where it is not."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ropewalk.files.embedded
from fake_model import FakeModel
from gptq_writer import write_checkpoint
from ropewalk.base.errors import CheckpointError
from ropewalk.engine.engine import Engine
from ropewalk.faces.cli.chat import Conversation
from ropewalk.faces.cli.main import main
from ropewalk.faces.cli.sampling_options import add_sampling_arguments, sampling_params
from ropewalk.faces.cli.terminal import progress_bar
from ropewalk.generate.sampling import SamplingParams
from ropewalk.text.chat_formats import NAMED_FORMATS
from ropewalk.text.example import EXAMPLE
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import LLAMA_CONFIG, write_config, write_sentencepiece

REFERENCE = ["--backend", "reference"]
COMMAND = [sys.executable, "-m", "ropewalk"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, {"vocab_size": 400, "max_position_embeddings": 256})
    return write_sentencepiece(folder)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A ropewalk is a long straight lane where rope is made.\n" * 20, encoding="utf-8")
    return path


class Input(io.TextIOWrapper):
    """Standard input that holds a text."""

    def __init__(self, text: str) -> None:
        super().__init__(io.BytesIO(text.encode()), encoding="utf-8")


def test_generate_streams_to_stdout_and_speaks_on_stderr(folder: Path, capsys) -> None:
    arguments = ["generate", str(folder), "--prompt", "The quick", "--temperature", "0", "--max-new-tokens", "9"]
    assert main([*arguments, *REFERENCE]) == 0
    first = capsys.readouterr()
    assert len(first.out) > 1 and first.out.endswith("\n")
    assert "RoPE scaling: none" in first.err
    assert "new 9 tokens" in first.err and "context" in first.err and "ended by length" in first.err
    assert main([*arguments, *REFERENCE, "--echo"]) == 0
    assert capsys.readouterr().out == "The quick" + first.out


def test_sampling_options_reach_the_sampler(folder: Path, capsys) -> None:
    options = ["--seed", "4", "--temperature", "1.5", "--top-k", "0", "--top-p", "1", "--max-new-tokens", "30"]
    more = ["--min-p", "0.001", "--typical", "0.99", "--repetition-penalty", "1.1", "--repetition-range", "20"]
    penalties = ["--frequency-penalty", "0.1", "--presence-penalty", "0.1", "--logit-bias", "5=-inf"]
    command = ["generate", str(folder), "--prompt", "rope", *REFERENCE, *options, *more, *penalties]
    outputs = []
    for extra in ([], [], ["--seed", "5"], ["--xtc-probability", "1", "--xtc-threshold", "0.001"]):
        assert main(command + extra) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert len(set(outputs[1:])) == 3


def test_dry_and_xtc_are_options_of_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    dry = ["--dry-multiplier", "5", "--dry-base", "2", "--dry-allowed-length", "1", "--dry-range", "50"]
    breakers = ["--dry-sequence-breaker", "z", "--dry-sequence-breaker", "y"]
    xtc = ["--xtc-probability", "0.5", "--xtc-threshold", "0.2"]
    assert sampling_params(parser.parse_args([*dry, *breakers, *xtc])) == SamplingParams(
        dry_multiplier=5,
        dry_base=2,
        dry_allowed_length=1,
        dry_range=50,
        dry_sequence_breakers=("z", "y"),
        xtc_probability=0.5,
        xtc_threshold=0.2,
    )
    assert sampling_params(parser.parse_args([])) == SamplingParams()


def test_prompts_come_from_files_and_from_standard_input(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "p.txt").write_text("Zwölf ropes", encoding="utf-8")
    greedy = ["--temperature", "0", "--max-new-tokens", "5", "--echo", *REFERENCE]
    assert main(["generate", str(folder), "--prompt-file", str(tmp_path / "p.txt"), *greedy]) == 0
    from_file = capsys.readouterr().out
    for arguments in (["--prompt-file", "-"], []):
        monkeypatch.setattr(sys, "stdin", Input("Zwölf ropes"))
        assert main(["generate", str(folder), *arguments, *greedy]) == 0
        assert capsys.readouterr().out == from_file


def test_the_embedded_model_is_the_default(capsys, monkeypatch, text_file: Path) -> None:
    assert main(["generate", "--max-new-tokens", "3", "--echo", *REFERENCE]) == 0
    assert capsys.readouterr().out.startswith(EXAMPLE)
    assert main(["info"]) == 0
    assert str(ropewalk.files.embedded.demo_model_path()) in capsys.readouterr().out
    assert main(["perplexity", str(text_file), "--lengths", "16", *REFERENCE]) == 0
    monkeypatch.setattr(sys, "stdin", Input("hi\n"))
    assert main(["chat", "--max-new-tokens", "2", *REFERENCE]) == 0


def test_one_talks_with_the_embedded_model_at_eight_times_its_context_and_measures_it_as_it_is(
    folder: Path, capsys, monkeypatch, text_file: Path
) -> None:
    for command, given, scaling in [
        ("generate", [], "RoPE scaling: yarn"),
        ("chat", [], "RoPE scaling: yarn"),
        ("generate", ["--compress-pos-emb", "2"], "RoPE scaling: linear"),
        ("generate", ["--rope-scaling", '{"type": "default"}'], "RoPE scaling: none"),
        ("generate", [str(folder), "--prompt", "rope"], "RoPE scaling: none"),
    ]:
        monkeypatch.setattr(sys, "stdin", Input("hi\n"))
        assert main([command, *given, "--max-new-tokens", "2", *REFERENCE]) == 0
        assert scaling in capsys.readouterr().err, (command, given)
    assert main(["perplexity", str(text_file), "--lengths", "16", *REFERENCE]) == 0
    assert "RoPE scaling: none" in capsys.readouterr().err


def test_a_missing_embedded_model_is_an_error_of_ours(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ropewalk.files.embedded, "__file__", str(tmp_path / "files" / "embedded.py"))
    with pytest.raises(CheckpointError, match="the embedded model is missing"):
        ropewalk.files.embedded.demo_model_path()


def test_info_as_text_and_as_json(folder: Path, capsys) -> None:
    assert main(["info", str(folder), "--compress-pos-emb", "2"]) == 0
    text = capsys.readouterr().out
    assert "4-bit, groups of 32" in text and "compress_pos_emb" in text and "512 positions" in text
    assert main(["info", str(folder), "--json", "--rope-scaling", '{"type": "linear", "factor": 2}']) == 0
    assert json.loads(capsys.readouterr().out)["max_seq_len"] == 512


@pytest.mark.parametrize("swapped", [False, True])
def test_perplexity_as_a_table_and_as_json(folder: Path, text_file: Path, capsys, swapped: bool) -> None:
    paths = [str(text_file), str(folder)] if swapped else [str(folder), str(text_file)]
    assert main(["perplexity", *paths, "--lengths", "16,64", *REFERENCE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["length", "16", "64"]
    assert main(["perplexity", *paths, "--lengths", "16", "--json", "--max-tokens", "64", *REFERENCE]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["length"], row["num_windows"]) == (16, 4)


def chat(monkeypatch, folder: Path, lines: str, *options: str) -> int:
    monkeypatch.setattr(sys, "stdin", Input(lines))
    fixed = ["--chat-template", "vicuna", "--temperature", "0", "--max-new-tokens", "6", *REFERENCE]
    return main(["chat", str(folder), *fixed, *options])


def test_chat_answers_undoes_and_forgets(folder: Path, capsys, monkeypatch) -> None:
    assert chat(monkeypatch, folder, "hello\n/undo\nhello\n/reset\nhello\n/undo\n/undo\n/what\n\n/exit\nlate\n") == 0
    captured = capsys.readouterr()
    replies = captured.out.splitlines()
    assert len(replies) >= 3
    assert captured.out.count(captured.out[: len(captured.out) // 3]) == 3, "the same question, the same answer"
    assert "forgot the last turn" in captured.err
    assert "forgot the conversation" in captured.err
    assert "there is nothing to undo" in captured.err
    assert captured.err.count("/reset forgets") == 2


def test_rescale_alone_says_how_it_is_scaled_now(folder: Path, capsys, monkeypatch) -> None:
    assert chat(monkeypatch, folder, "/rescale linear 2\n/rescale\n") == 0
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("RoPE scaling: linear, factor 2") and "/rescale METHOD [FACTOR]" in last


def test_chat_turns_reuse_the_prompt(folder: Path, capsys, monkeypatch) -> None:
    assert chat(monkeypatch, folder, "hello\nmore\n", "--system", "Be brief.") == 0
    stats = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prompt")]
    assert "(0 reused)" in stats[0]
    assert int(stats[1].split("(")[1].split()[0]) > 10


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(folder: Path, capsys, monkeypatch) -> None:
    assert chat(monkeypatch, folder, "a rope\n" * 12, "--system", "S") == 0
    error = capsys.readouterr().err
    assert "the context is full: forgot the" in error
    assert error.count("prompt ") == 12


def test_a_question_that_does_not_fit_is_refused_and_forgotten(folder: Path, capsys, monkeypatch) -> None:
    assert chat(monkeypatch, folder, "rope " * 300 + "\nhello\n") == 0
    error = capsys.readouterr().err
    assert "more than the context of 256" in error
    assert error.count("ended by") == 1


def test_control_c_ends_a_reply_and_the_conversation_goes_on(folder: Path, capsys) -> None:
    def interrupt_once(history: list[int]) -> None:
        if len(history) == interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)

    model = FakeModel(400, capacity=256, script=interrupt_once)
    engine = Engine(model, load_tokenizer(folder), "vicuna")
    conversation = Conversation(engine, SamplingParams(temperature=0, max_new_tokens=20), None)
    interrupt_at = len(engine.chat_ids([{"role": "user", "content": "one"}])) + 3
    assert "ended by cancelled" in conversation.ask("one")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert "ended by length" in conversation.ask("two")
    with pytest.raises(KeyboardInterrupt):  # between replies it is an ordinary Ctrl-C again
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


class Terminal(io.StringIO):
    """Standard error that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_terminals_only_and_for_long_work_only(monkeypatch) -> None:
    for stream, total, drawn in ((Terminal(), 20, True), (Terminal(), 5, False), (io.StringIO(), 20, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar("loading", "layer", at_least=10) as progress:
            for done in range(1, total + 1):
                if progress is not None:
                    progress(done, total)
        assert ("loading" in stream.getvalue()) is drawn


def test_chat_uses_the_template_of_the_folder(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    write_config(tmp_path, **LLAMA_CONFIG, chat_template="{{ raise_exception('no ' + messages[-1].content) }}")
    monkeypatch.setattr(sys, "stdin", Input("hello\n"))
    assert main(["chat", str(tmp_path), *REFERENCE]) == 0
    assert "refuses these messages: no hello" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "/no/where", "--prompt", "x"], "model folder /no/where does not exist"),
        (["info", "/no/where"], "/no/where"),
        (["generate", "FOLDER", "--prompt", "x", "--top-p", "7"], "top_p must be a number above 0 to 1, got 7.0"),
        (["generate", "FOLDER", "--prompt-file", "/no/file"], "/no/file cannot be read"),
        (["generate", "FOLDER", "--prompt", "rope " * 300], "more than the context of 256"),
        (["generate", "FOLDER", "--prompt", "x", "--max-seq-len", "0"], "max_seq_len must be a positive integer"),
        (["generate", "FOLDER", "--prompt", "x", "--isa", "avx9"], "isa='avx9' is an option of backend"),
        (["generate", "FOLDER", "--prompt", "x", "--stop-token-id", "400"], "the model knows 0 to 399"),
        (["perplexity", "FOLDER", "/no/file"], "/no/file cannot be read"),
        (["chat", "FOLDER", "--chat-template", "gpt"], "'gpt' is not known"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(folder: Path, capsys, arguments: list[str], message: str) -> None:
    arguments = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
    assert main(arguments + ([] if arguments[0] == "info" else REFERENCE)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ropewalk: error: ")]
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice"),
        (["generate", "--logit-bias", "5"], "ID=X is needed"),
        (["generate", "--rope-scaling", "{"], "not JSON"),
        (["generate", "--rope-scaling", "yarn"], "accepted are auto and objects such as {"),
        (["info", "https://example.org/TheBloke/Rope-GPTQ"], "is an address: give a folder, or a name such as"),
        (["generate", "--rope-scaling", "[]"], "a JSON object such as"),
        (["perplexity", "x", "--lengths", "1,b"], "numbers separated by commas"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "not allowed with"),
    ],
)
def test_wrong_options_explain_themselves(capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_text_that_is_not_utf8_is_refused(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "latin").write_bytes("Zwölf".encode("latin-1"))
    assert main(["generate", str(folder), "--prompt-file", str(tmp_path / "latin"), *REFERENCE]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def run(arguments: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, **options)


def test_the_module_runs_as_a_command(folder: Path) -> None:
    done = run(["generate", str(folder), "--prompt", "rope", "--max-new-tokens", "4", "--seed", "1", *REFERENCE])
    assert done.returncode == 0
    assert done.stdout.endswith("\n")
    assert "Traceback" not in done.stderr


def test_a_terminal_without_unicode_gets_marks_instead_of_an_error(folder: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run(
        ["generate", str(folder), "--prompt", "é🙂", "--echo", "--max-new-tokens", "2", *REFERENCE], env=environment
    )
    assert done.returncode == 0
    assert done.stdout.startswith("??")


def test_a_closed_pipe_ends_quietly(folder: Path) -> None:
    command = [
        *COMMAND,
        "generate",
        str(folder),
        "--prompt",
        "rope",
        "--ignore-eos",
        "--max-new-tokens",
        "200",
        *REFERENCE,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(timeout=120) == 141
    assert "Traceback" not in error and "Exception ignored" not in error


@pytest.mark.skipif(os.name != "posix", reason="SIGINT is sent as on POSIX systems")
def test_control_c_ends_with_130(folder: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "chat", str(folder), "--chat-template", "vicuna", *REFERENCE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while "Ctrl-C stops a reply" not in process.stderr.readline().decode():
        assert process.poll() is None
    time.sleep(0.2)  # from the line to waiting for input
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in error


def test_importing_the_package_and_its_command_stays_light() -> None:
    code = "import sys, ropewalk, ropewalk.faces.cli.main; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_the_help_lists_every_named_chat_format(command: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    formats = shown.partition("--chat-template NAME one of ")[2].partition("; default")[0]
    assert [name.split(" (")[0] for name in formats.split(", ")] == list(NAMED_FORMATS)


def test_info_says_of_a_folder_that_is_not_loaded_what_it_is_and_what_runs_it(tmp_path: Path, capsys) -> None:
    (tmp_path / "m.Q4_K_M.gguf").touch()
    assert main(["info", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "what       a llama.cpp model (GGUF)\nruns with  llama.cpp" in shown.out
    assert "ropewalk: error:" in shown.err
    assert main(["info", str(tmp_path), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["loads"] is False and "GGUF" in found["what"] and str(tmp_path) in found["reason"]


def test_list_shows_the_models_below_folders(folder: Path, tmp_path: Path, capsys) -> None:
    assert main(["list", str(folder.parent)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["MODEL", "FAMILY", "WEIGHTS", "SIZE", "CONTEXT", "LOADS"]
    assert any(row.startswith(folder.name) and row.endswith("yes") for row in rows)
    assert main(["list", str(tmp_path / "none")]) == 2
    assert "is not a folder: name one that holds models" in capsys.readouterr().err
