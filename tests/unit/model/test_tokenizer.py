from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blyan_node.errors import CheckpointError, RequestError
from blyan_node.inference.generation import Message
from blyan_node.model.tokenizer import Tokenizer
from tests.support.models import CHAT_TEMPLATE
from tests.unit.model.conftest import Imported

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def tokenizer(tiny: Imported) -> Tokenizer:
    return Tokenizer(tiny.tokenizer)


@given(text)
def test_any_text_comes_back(tokenizer: Tokenizer, original: str) -> None:
    assert tokenizer.decode(tokenizer.encode(original)) == original


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.finish()]


@settings(max_examples=300)
@given(text)
def test_streamed_text_is_the_whole_and_never_half_a_character(tokenizer: Tokenizer, original: str) -> None:
    streamed = pieces(tokenizer, list(tokenizer.encode(original)))
    assert "".join(streamed) == original
    if "\ufffd" not in original:
        assert not any("\ufffd" in piece for piece in streamed)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 1100), max_size=60))
def test_any_ids_stream_to_their_decoding(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_text_is_shown_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    ids = [token for byte in "a€b".encode() for token in tokenizer.encode(bytes([byte]).decode("latin-1"))]
    single = [tokenizer.encode("a")[0], *byte_ids(tokenizer, "€"), tokenizer.encode("b")[0]]
    assert ids  # the alphabet holds every byte
    assert pieces(tokenizer, single) == ["a", "", "", "€", "b", ""]


def byte_ids(tokenizer: Tokenizer, character: str) -> list[int]:
    """Ids of the single-byte tokens that spell a character."""
    ids = list(tokenizer.encode(character))
    assert len(ids) == len(character.encode())
    return ids


def test_bytes_that_never_become_text_are_not_held_for_ever(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    continuation = byte_ids(tokenizer, "€")[1]
    assert sum(bool(stream.push(continuation)) for _ in range(300)) >= 4


def test_special_tokens_are_ids_not_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_end|>") == (2,)
    assert tokenizer.decode((1, 2)) == ""
    assert tokenizer.eos_ids == {2}


def test_a_chat_renders_with_the_models_template(tokenizer: Tokenizer) -> None:
    rendered = tokenizer.render([Message("user", "Hi {{ x }}")])
    assert rendered == "<|im_start|>user\nHi {{ x }}<|im_end|>\n<|im_start|>assistant\n"


def changed(blob: bytes, **changes: Any) -> bytes:
    return json.dumps(json.loads(blob) | changes).encode()


def test_without_a_template_a_chat_is_refused(tiny: Imported) -> None:
    plain = Tokenizer(changed(tiny.tokenizer, chat_template=None))
    with pytest.raises(RequestError, match="plain prompt"):
        plain.render([Message("user", "Hi")])


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer": {}},
        {"tokenizer": []},
        {"tokenizer": {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "zz"]]}}},
        {"tokenizer": {"version": "9", "model": {"type": "Nonsense"}}},
        {"chat_template": 5},
        {"chat_template": "{% if %}"},
        {"eos_ids": "2"},
        {"eos_ids": [-1]},
        {"eos_ids": [True]},
        {"eos_ids": list(range(100))},
        {"bos_token": ["x"]},
        {"more": 1},
    ],
)
def test_a_broken_blob_is_named(tiny: Imported, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        Tokenizer(changed(tiny.tokenizer, **changes))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_tokenizer(blob: bytes) -> None:
    with pytest.raises(CheckpointError):
        Tokenizer(blob)


@pytest.mark.parametrize("model", [{"continuing_subword_prefix": "x"}, {"type": "WordPiece"}, {"type": None}])
def test_what_would_end_the_process_is_refused_before_the_library_sees_it(
    tiny: Imported, model: dict[str, Any]
) -> None:
    raw = json.loads(tiny.tokenizer)["tokenizer"]
    with pytest.raises(CheckpointError, match="only plain BPE"):
        Tokenizer(changed(tiny.tokenizer, tokenizer={**raw, "model": {**raw["model"], **model}}))


def test_deep_nesting_is_no_tokenizer() -> None:
    with pytest.raises(CheckpointError):
        Tokenizer(b"[" * 100_000)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_mutilated_tokenizer_never_escapes_its_error(tiny: Imported, data: st.DataObject) -> None:
    """A peer's tokenizer with one value replaced anywhere loads, or raises CheckpointError; nothing else happens."""
    fields = json.loads(tiny.tokenizer)
    holder: Any = fields["tokenizer"]
    while True:
        key = data.draw(
            st.sampled_from(sorted(holder)) if isinstance(holder, dict) else st.integers(0, len(holder) - 1)
        )
        if not isinstance(holder[key], dict | list) or not holder[key] or data.draw(st.booleans()):
            break
        holder = holder[key]
    holder[key] = data.draw(st.sampled_from([None, -1, 1 << 40, "", "x", "(", [], {}, True, [["a"]], {"type": "BPE"}]))
    try:
        tokenizer = Tokenizer(json.dumps(fields).encode())
    except CheckpointError:
        return
    tokenizer.decode((0, 1, 2, 300))


def test_the_template_of_the_tests_is_in_the_blob(tiny: Imported) -> None:
    assert json.loads(tiny.tokenizer)["chat_template"] == CHAT_TEMPLATE
