"""Text of a generation: stop strings never show, not even their beginning, and nothing else is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blyan_node.inference.text import TextStream


class Letters:
    """A detokenizer whose tokens are code points."""

    def push(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return ""


def run(text: str, stop: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(Letters(), stop)
    pieces = []
    for letter in text:
        pieces.append(stream.push(ord(letter)))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream


@given(st.text("ab", max_size=30), st.lists(st.text("ab", max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    pieces, stream = run(text, stop)
    ends = [at + len(word) for word in stop if word and (at := text.find(word)) >= 0]
    if not ends:
        assert stream.text == text
    else:
        seen = text[: min(ends)]  # the moment at which the first stop string was whole
        begins = [at for word in stop if word and (at := seen.find(word)) >= 0]
        assert stream.text == seen[: min(begins)]
    assert "".join(pieces) == stream.text
    assert stream.stopped == bool(ends)


def test_a_stop_string_that_only_began_is_shown_at_the_end() -> None:
    pieces, stream = run("hello wor", ["world"])
    assert pieces[-1] == "wor"
    assert stream.text == "hello wor"
