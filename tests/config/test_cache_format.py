"""The spellings of cache formats, and what a position takes in each."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.base.errors import ConfigError
from ropewalk.config.cache_format import CODE_BITS, KINDS, CacheFormat, hadamard_size, is_rotated

kinds = st.sampled_from(KINDS)
windows = st.integers(0, 1024).map(lambda pages: 64 * pages)


@given(kinds, kinds, windows)
def test_a_format_is_spelled_and_read_again(keys: str, values: str, recent: int) -> None:
    if recent and not {keys, values} & set(CODE_BITS):
        with pytest.raises(ConfigError, match="beside"):
            CacheFormat(keys, values, recent)
        return
    made = CacheFormat(keys, values, recent)
    assert CacheFormat.parse(str(made)) == made
    assert str(made).partition("+")[0] in (keys, f"{keys}_{values}")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "there is no ''; accepted are fp32, fp16, q8, q6, q4, two of them as keys_values such as q8_q4"),
        ("q5", "there is no 'q5'"),
        ("Q4", "there is no 'Q4'"),
        ("q4_", "there is no 'q4_'"),
        ("q4_q5", "there is no 'q4_q5'"),
        ("q8_q4_q4", "there is no 'q8_q4_q4'"),
        ("q4+", "'\\+' is followed by a number of positions"),
        ("q4+0", "'\\+' is followed by a number"),
        ("q4+-64", "'\\+' is followed by a number"),
        ("q4+²", "'\\+' is followed by a number"),
        ("q4+" + "9" * 5000, "'\\+' is followed by a number"),
        ("q4+100", "a window of 100 recent positions; it must be a multiple of 64, at most 65536"),
        ("q4+65600", "a multiple of 64, at most 65536"),
        ("fp16+256", "fp16\\+256 would keep recent positions in float16 beside fp16 ones"),
        (16, "must be a text, got int"),
    ],
)
def test_what_is_not_a_format_is_refused(text: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"cache_type.*{message}"):
        CacheFormat.parse(text)


@given(st.text())
def test_any_text_is_a_format_or_refused(text: str) -> None:
    with suppress(ConfigError):
        assert CacheFormat.parse(text).keys in KINDS


@pytest.mark.parametrize(
    "text, head_dim, bits",
    [("fp32", 64, 32), ("fp16", 64, 16), ("q8", 64, 8.5), ("q6", 128, 6.5), ("q4", 128, 4.5), ("q8_q4", 64, 6.5)],
)
def test_a_number_takes_its_code_and_a_32nd_of_a_scale(text: str, head_dim: int, bits: float) -> None:
    assert CacheFormat.parse(text).position_bytes(3, head_dim) == 2 * 3 * head_dim * bits / 8


def test_heads_of_other_sizes_are_padded_to_whole_blocks() -> None:
    assert CacheFormat.parse("q4").position_bytes(1, 80) == CacheFormat.parse("q4").position_bytes(1, 96) == 2 * 54
    assert CacheFormat.parse("fp16").position_bytes(1, 80) == 2 * 160


def test_heads_are_rotated_below_8_bits() -> None:
    assert [kind for kind in KINDS if is_rotated(kind)] == ["q6", "q4"]
    assert [hadamard_size(size) for size in (64, 80, 96, 100, 7)] == [64, 16, 32, 4, 1]


@given(st.integers(0, 5000), windows.filter(bool))
def test_the_last_positions_are_read_in_float16_by_whole_pages(position: int, recent: int) -> None:
    first = 64 * CacheFormat("q4", "q4", recent).first_exact_page(position)
    oldest = max(0, position - recent + 1)  # of the `recent` last ones, the query's own included
    assert oldest - 64 < first <= oldest
