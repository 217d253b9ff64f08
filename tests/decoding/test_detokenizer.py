# SPDX-License-Identifier: Apache-2.0
"""Pieces of text come only when they are certain, and together are the whole text."""

from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dsjax.data import encode_text, load_tokenizer
from dsjax.decoding.detokenizer import TextStream


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return load_tokenizer(folder)


def pieces(tokenizer: PreTrainedTokenizerFast, text: str, stops: tuple[str, ...] = ()) -> list[str]:
    """Stream the tokens of a text until a stop text ends it."""
    stream, out = TextStream(tokenizer, encode_text(tokenizer, "the question"), stops), []
    for token in encode_text(tokenizer, text, add_bos=False):
        out.append(stream.push(token))
        if stream.stopped:
            break
    return [*out, stream.finish()]


def test_a_character_comes_whole(tokenizer):
    # One byte is one token here: é takes two, 深 three, 🌊 four.
    assert pieces(tokenizer, "é深🌊!") == ["", "é", "", "", "深", "", "", "", "🌊", "!", ""]


def test_half_a_character_at_the_end_comes_last(tokenizer):
    ids = encode_text(tokenizer, "a深", add_bos=False)
    stream = TextStream(tokenizer, [0])
    assert [stream.push(token) for token in ids[:-1]] == ["a", "", ""]
    assert set(stream.finish()) == {"\ufffd"}


def test_special_tokens_are_not_shown(tokenizer):
    stream = TextStream(tokenizer, [0])
    ids = encode_text(tokenizer, f"a{tiny.PAD}b", add_bos=False)
    assert "".join(stream.push(token) for token in ids) + stream.finish() == "ab"


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=30))
def test_pieces_are_the_text(tokenizer, text: str):
    assert "".join(pieces(tokenizer, text)) == text


@given(before=st.text("ab", max_size=6), stop=st.text("ab", min_size=1, max_size=3))
def test_a_stop_text_ends_the_text_before_it(tokenizer, before: str, stop: str):
    whole = before + stop + "c"
    found = pieces(tokenizer, whole, (stop,))
    assert "".join(found) == whole[: whole.find(stop)]


def test_what_could_begin_a_stop_text_is_held_back(tokenizer):
    assert pieces(tokenizer, "x##y#", ("###", "#z")) == ["x", "", "", "##y", "", "#"]
    assert pieces(tokenizer, "x###y", ("###",)) == ["x", "", "", "", ""]


def test_the_first_of_several_stop_texts_ends_it(tokenizer):
    assert "".join(pieces(tokenizer, "one two three", ("two", "ne", "three"))) == "o"
