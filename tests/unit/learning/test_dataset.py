from __future__ import annotations

import json
from pathlib import Path

import pytest

from blyan_node.errors import RequestError
from blyan_node.learning import dataset
from blyan_node.learning.dataset import Windows, cut_windows, read_documents


class Letters:
    """A tokenizer of which each byte is a token."""

    eos_ids = frozenset({7, 3})

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())


def written(tmp_path: Path, data: bytes, name: str = "some.txt") -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    assert read_documents(written(tmp_path, "Grüße\n\nan alle\n".encode())) == ["Grüße\n\nan alle\n"]


def test_each_line_of_jsonl_is_a_document(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "one", "id": 1}), "", json.dumps({"text": "two\nlines"})]
    assert read_documents(written(tmp_path, "\n".join(lines).encode(), "some.jsonl")) == ["one", "two\nlines"]


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n", "no text"),
        ("a.txt", b"ab\xff\xfe", "not text in UTF-8 .byte 2"),
        ("a.txt", b"ab\0", "zero bytes"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 7}', 'line 2 is no object with a "text"'),
        ("a.jsonl", b'{"text": "a"}\n[]', 'line 2 is no object with a "text"'),
        ("a.jsonl", b"{}", "line 1 is no object"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 is not text"),
        ("a.jsonl", b'{"text": "\\u0000"}', "line 1 is not text"),
        ("a.jsonl", b"\x80\x04\x95", "line 1 is not text"),
    ],
)
def test_junk_is_refused_by_name(tmp_path: Path, name: str, data: bytes, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        read_documents(written(tmp_path, data, name))


def test_what_is_too_large_or_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, b'{"text": "abcdef"}', "a.jsonl")
    monkeypatch.setattr(dataset, "MAX_LINE", 5)
    with pytest.raises(RequestError, match="longer"):
        read_documents(path)
    monkeypatch.setattr(dataset, "MAX_BYTES", 5)
    with pytest.raises(RequestError, match="larger"):
        read_documents(path)
    with pytest.raises(RequestError, match="No such file"):
        read_documents(tmp_path / "nowhere")


def test_windows_cover_the_text_and_overlap_by_one() -> None:
    windows = cut_windows(["abcdefghi", "jklmnopqrstuvw"], Letters(), 3)
    ids = [*b"abcdefghi", 3, *b"jklmnopqrstuvw", 3]
    every = sorted([*windows.train, *windows.held_out], key=lambda window: ids.index(window[0]))
    assert every == [ids[start : start + 4] for start in range(0, len(ids) - 3, 3)]
    assert len(windows.held_out) == 1


def test_at_most_sixteen_windows_are_held_out_from_all_over_the_text() -> None:
    windows = cut_windows(["x" * 40_000], Letters(), 10)
    assert (len(windows.train), len(windows.held_out)) == (3984, 16)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(RequestError, match="at least 41"):
        cut_windows(["short"], Letters(), 10)


def test_every_window_comes_once_a_round_in_another_order_each_time() -> None:
    windows = Windows(tuple([index] for index in range(10)), ())
    seen = [window[0] for step in range(5) for window in windows.batch(step, 4, seed=1)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert windows.batch(3, 4, seed=1) == windows.batch(3, 4, seed=1) != windows.batch(3, 4, seed=2)
    assert [windows.steps(epochs, 4) for epochs in (1, 2)] == [3, 5]
