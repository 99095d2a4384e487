"""text/tokenizer: both kinds of file, streams against whole texts, special tokens, damaged folders."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import gptq_fixture_folders
from ropewalk.base.errors import ConfigError, RequestError, UnsupportedError
from ropewalk.text.tokenizer.load import StreamDecoder, Tokenizer, check_tokenizer_fits, keeps_text, load_tokenizer
from tokenizer_writer import (
    LLAMA_CONFIG,
    WRITERS,
    write_byte_level_json,
    write_config,
    write_fallback_json,
    write_sentencepiece,
)

TEXTS = [
    "Hello world",
    " leading",
    "trailing ",
    "two  spaces, and    four",
    "line\n\n  indented\n\ttab",
    "déjà vu, Straße, 東京, 🙂🇩🇪👨‍👩‍👧",
    "0x41 <0x41> <not a token>",
    "",
]


@pytest.fixture(scope="session", params=WRITERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def tokenizer(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(WRITERS[kind](tmp_path_factory.mktemp(kind)))


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_from_its_tokens(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=40))
def test_any_unicode_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    # U+2581 stands for a space in pieces: sentencepiece itself gives it back as one. The text of a special token is
    # read as that token, which has no text.
    special = {"▁", "<unk>", *tokenizer.special_tokens.values()}
    if not any(word in text for word in special):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_pieces_of_a_stream_are_together_the_whole_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    byte_ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)[:1] >= b"\x80"]
    some_id = st.integers(0, tokenizer.vocab_size + 5) | st.sampled_from(byte_ids)
    ids = data.draw(st.lists(some_id, max_size=30))
    skip = data.draw(st.booleans())
    stream = StreamDecoder(tokenizer, skip)
    pieces = [*map(stream.push, ids), stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip)
    whole = b"".join(tokenizer.token_bytes(i) for i in ids if not (skip and i in tokenizer.special_ids))
    if tokenizer.drops_first_space:
        whole = whole.removeprefix(b" ")
    assert "".join(pieces) == whole.decode("utf-8", errors="replace")


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=30), cut=st.integers(0, 60))
def test_a_stream_after_a_context_continues_its_text(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text, add_bos=False)
    cut = min(cut, len(ids))
    before = StreamDecoder(tokenizer)
    shown = "".join(map(before.push, ids[:cut]))
    stream = StreamDecoder(tokenizer, context_ids=ids[:cut])
    assert shown + "".join(map(stream.push, ids[cut:])) + stream.flush() == tokenizer.decode(ids)


def test_a_character_is_shown_whole_with_its_last_byte(tokenizer: Tokenizer) -> None:
    for character in "é東🙂":
        ids = tokenizer.encode(f"x{character}", add_bos=False)
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(token_id) for token_id in ids]
        assert pieces[-1] == character or "".join(pieces) == f"x{character}"
        assert "�" not in "".join(pieces)


def test_an_unfinished_character_is_shown_as_such_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂", add_bos=False)[:-1]
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, ids)).strip() == ""
    assert stream.flush() == "�"


def test_a_long_stream_of_bytes_takes_constant_time_per_token(tokenizer: Tokenizer) -> None:
    continuation = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xa9")

    def duration(count: int) -> float:
        stream = StreamDecoder(tokenizer)
        started = time.perf_counter()
        for _ in range(count):
            stream.push(continuation)
        return time.perf_counter() - started

    duration(1000)
    # Quadratic time would make the ratio 100; the best of three takes out pauses of the machine.
    assert min(duration(50_000) / duration(5_000) for _ in range(3)) < 40


def test_the_bos_token_is_added_as_told_and_never_twice(tokenizer: Tokenizer) -> None:
    bare = tokenizer.encode("a", add_bos=False)
    assert tokenizer.encode("a") == tokenizer.encode("a", add_bos=True) == [tokenizer.bos_id, *bare]
    bos_text = tokenizer.special_tokens["bos_token"]
    assert tokenizer.encode(bos_text + "a")[:2] != [tokenizer.bos_id] * 2
    assert tokenizer.encode(bos_text + "a")[0] == tokenizer.bos_id


def test_special_tokens_are_recognised_in_text_and_left_out_of_it(tokenizer: Tokenizer) -> None:
    eos_text = tokenizer.decode([tokenizer.eos_id], skip_special=False)
    assert tokenizer.id_of(eos_text) == tokenizer.eos_id
    ids = tokenizer.encode(f"one{eos_text}two", add_bos=False)
    assert ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(ids, skip_special=False).replace(" ", "") == f"one{eos_text}two"
    assert eos_text not in tokenizer.decode(ids)


@pytest.mark.parametrize(("add", "expected"), [(True, True), (False, False), (None, True)])
def test_add_bos_token_of_the_config_decides(kind: str, tmp_path: Path, add: bool | None, expected: bool) -> None:
    folder = WRITERS[kind](tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text()) if kind != "sentencepiece" else LLAMA_CONFIG
    write_config(folder, **config, **({} if add is None else {"add_bos_token": add}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.encode("a")[0] == tokenizer.bos_id) is expected


def test_byte_level_text_equals_that_of_the_library(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level_json(tmp_path))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text) == library.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == library.decode(library.encode(text).ids)
    assert tokenizer.id_of("<tool>") not in tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode("a<tool>b<|im_end|>")) == "a<tool>b"


def test_fallback_text_equals_that_of_the_library(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_fallback_json(tmp_path))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == library.decode(ids)


def test_sentencepiece_text_equals_that_of_the_library(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path))
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in TEXTS:
        assert tokenizer.encode(text, add_bos=False) == library.encode(text)
        assert tokenizer.decode(library.encode(text)) == library.decode(library.encode(text))


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_text_after_a_special_token_has_a_space_only_in_legacy_mode(tmp_path: Path, legacy: bool) -> None:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, **LLAMA_CONFIG, legacy=legacy))
    ids = tokenizer.encode("</s>rope", add_bos=False)
    assert tokenizer.decode(ids, skip_special=False) == ("</s> rope" if legacy else "</s>rope")
    assert tokenizer.decode(tokenizer.encode("rope")) == "rope"


def test_added_tokens_of_both_json_files_extend_sentencepiece(tmp_path: Path) -> None:
    folder = write_sentencepiece(
        tmp_path, **LLAMA_CONFIG, added_tokens_decoder={"400": {"content": "<|im_start|>", "special": True}}
    )
    write_config(folder, "added_tokens.json", **{"<tool>": 401})
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.base_vocab_size, tokenizer.vocab_size) == (400, 402)
    ids = tokenizer.encode("<|im_start|>hi<tool>", add_bos=False)
    assert (ids[0], ids[-1]) == (400, 401)
    assert tokenizer.decode(ids) == " hi<tool>".removeprefix(" ")


def test_special_tokens_map_fills_what_the_config_lacks(tmp_path: Path) -> None:
    folder = write_byte_level_json(tmp_path, bos_token=None)
    write_config(folder, "special_tokens_map.json", bos_token="<|begin|>", eos_token={"content": "<|im_end|>"})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == tokenizer.id_of("<|im_end|>")


def test_without_a_config_the_post_processor_names_the_bos_token(tmp_path: Path) -> None:
    folder = write_byte_level_json(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a")[0] == tokenizer.bos_id == tokenizer.id_of("<|begin|>")
    assert tokenizer.eos_id is None


def test_tokenizer_json_is_preferred(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    assert load_tokenizer(write_fallback_json(tmp_path)).source.name == "tokenizer.json"


def test_a_tokenizer_json_that_loses_text_gives_way_to_tokenizer_model(tmp_path: Path, caplog) -> None:
    write_sentencepiece(tmp_path)
    write_fallback_json(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    byte_level = json.loads((write_byte_level_json(tmp_path / "other") / "tokenizer.json").read_text(encoding="utf-8"))
    document.update({key: byte_level[key] for key in ("pre_tokenizer", "decoder")}, normalizer=None)
    document["model"].update(byte_fallback=False, unk_token=None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.source.name == "tokenizer.model"
    assert "loses text" in caplog.text
    (tmp_path / "tokenizer.model").unlink()
    caplog.clear()
    assert load_tokenizer(tmp_path).source.name == "tokenizer.json"
    assert "changes text when encoding" in caplog.text


def test_truncation_and_padding_of_a_tokenizer_json_are_not_applied(tmp_path: Path) -> None:
    folder = write_byte_level_json(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).decode(load_tokenizer(folder).encode("rope " * 30)) == "rope " * 30


@pytest.mark.parametrize("folder", gptq_fixture_folders(), ids=lambda folder: folder.name)
def test_tokenizers_of_the_fixtures_keep_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert keeps_text(tokenizer)
    assert tokenizer.vocab_size <= json.loads((folder / "config.json").read_text())["vocab_size"]
    assert tokenizer.encode("rope")[0] == tokenizer.bos_id


def test_a_missing_tokenizer_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has no tokenizer: .*\(found: config.json\)"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", "not valid JSON"),
        ("tokenizer.json", b"{", "not valid JSON"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8"),
        ("tokenizer.json", b"[]", "must hold a JSON object"),
        ("tokenizer.json", b"{}", "not a tokenizer that the tokenizers library can use"),
        ("tokenizer.model", b"", "it is empty"),
        ("tokenizer.model", b"\x00\x01garbage", "not a sentencepiece model"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        load_tokenizer(tmp_path)
    assert name in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token must be true, false or null"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder must be an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "must map token ids"),
        ("added_tokens.json", '{"<pad>": "32000"}', "must be mapped to a token id"),
    ],
)
def test_wrong_settings_name_file_and_key(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_sentencepiece(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("cut", [10, 1000, -20])
def test_a_truncated_file_is_an_error_of_ours(kind: str, tmp_path: Path, cut: int) -> None:
    folder = WRITERS[kind](tmp_path)
    path = folder / ("tokenizer.model" if kind == "sentencepiece" else "tokenizer.json")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ConfigError, match=path.name):
        load_tokenizer(folder)


def test_a_decoder_that_needs_neighbours_is_refused(tmp_path: Path) -> None:
    folder = write_byte_level_json(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(UnsupportedError, match="decoder type 'WordPiece' is not supported; accepted are ByteLevel"):
        load_tokenizer(folder)


def test_a_tokenizer_of_a_larger_vocabulary_belongs_to_another_model(tmp_path: Path, caplog) -> None:
    tokenizer = load_tokenizer(write_byte_level_json(tmp_path))
    with pytest.raises(ConfigError, match="it belongs to another model"):
        check_tokenizer_fits(tokenizer, tokenizer.base_vocab_size - 1)
    with caplog.at_level(logging.WARNING):
        check_tokenizer_fits(tokenizer, tokenizer.base_vocab_size)
    assert "the model knows only ids 0 to" in caplog.text
    caplog.clear()
    check_tokenizer_fits(tokenizer, tokenizer.vocab_size)
    assert not caplog.text


@pytest.mark.parametrize("text", [None, b"bytes", 5, "half \ud83d"])
def test_anything_but_text_is_refused(tokenizer: Tokenizer, text: object) -> None:
    with pytest.raises(RequestError, match="text"):
        tokenizer.encode(text)


@pytest.mark.parametrize("ids", [[-1], ["1"], [1.5], [True]])
def test_anything_but_token_ids_is_refused(tokenizer: Tokenizer, ids: list) -> None:
    with pytest.raises(RequestError, match="non-negative integers"):
        tokenizer.decode(ids)


def test_asking_for_a_bos_token_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level_json(tmp_path, bos_token=None))
    with pytest.raises(RequestError, match="declares no bos token"):
        tokenizer.encode("a", add_bos=True)
    assert tokenizer.encode("a") == tokenizer.encode("a", add_bos=False)


def test_the_same_text_in_a_copied_folder_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    folder = WRITERS[kind](tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    assert load_tokenizer(folder).encode(TEXTS[5]) == load_tokenizer(tmp_path / "b").encode(TEXTS[5])


def test_a_file_that_makes_the_library_panic_is_an_error_of_ours(tmp_path: Path) -> None:
    folder = write_byte_level_json(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["post_processor"]["special_tokens"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ConfigError, match="is not a tokenizer that the tokenizers library can use"):
        load_tokenizer(folder).encode("a")


def test_a_sentencepiece_model_with_damaged_text_is_an_error_of_ours(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path)
    data = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data.replace("ö".encode(), b"\xff\xff"))
    with pytest.raises(ConfigError, match="a piece is not UTF-8 text"):
        load_tokenizer(folder)


def test_added_tokens_of_a_fallback_json_may_hold_the_sign_for_a_space(tmp_path: Path) -> None:
    folder = write_fallback_json(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_tokens([tokenizers.AddedToken("▁<PRE>", normalized=False)])
    library.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    ids = [*tokenizer.encode("a", add_bos=False), tokenizer.id_of("▁<PRE>")]
    assert tokenizer.decode(ids) == library.decode(ids) == "a <PRE>"


def test_a_library_that_quotes_a_whole_file_is_cut_short(tmp_path: Path) -> None:
    folder = write_byte_level_json(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"] = "x" * 100_000
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="tokenizers library can use .*xxx") as caught:
        load_tokenizer(folder)
    assert len(str(caught.value)) < 1000
