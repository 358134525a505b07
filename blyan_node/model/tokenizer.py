"""Text to token ids and back, chat templates, and text that streams without half characters.

A model's tokenizer travels as one blob of JSON: ``{"tokenizer": <tokenizer.json of the tokenizers library>,
"chat_template": jinja or null, "bos_token", "eos_token": text or null, "eos_ids": [ids that end a generation]}``. The
blob may come from a peer: it is bounded, and its template runs in a sandbox (:mod:`blyan_node.model.template`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer as RawTokenizer

from blyan_node.errors import CheckpointError, RequestError
from blyan_node.model.template import ChatTemplate

MAX_BLOB = 64 << 20
MAX_EOS = 64
HOLD_MOST = 64  # tokens that the stream holds back, at most, waiting for the end of a character

_FIELDS = {"tokenizer", "chat_template", "bos_token", "eos_token", "eos_ids"}
_REPLACEMENT = "\ufffd"


class ChatMessage(Protocol):
    """One turn of a chat."""

    @property
    def role(self) -> str:
        """Who speaks: ``system``, ``user`` or ``assistant``."""

    @property
    def content(self) -> str:
        """What is said."""


def build_blob(raw: str, template: str | None, bos: str | None, eos: str | None, eos_ids: set[int]) -> bytes:
    """Make a tokenizer blob and check it by loading it; raise CheckpointError where it cannot be used."""
    fields = {
        "tokenizer": json.loads(raw),
        "chat_template": template,
        "bos_token": bos,
        "eos_token": eos,
        "eos_ids": sorted(eos_ids),
    }
    blob = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    Tokenizer(blob)
    return blob


def parse_raw(data: bytes) -> RawTokenizer:
    """Parse a tokenizer.json; raise CheckpointError where it cannot be used."""
    _check_model(data)
    try:
        return RawTokenizer.from_str(data.decode())
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"the tokenizer cannot be read ({error}): fetch it again") from error


def _check_model(data: bytes) -> None:
    """Refuse what the library does not survive: with a subword prefix that its merges lack, it ends the process."""
    try:
        model = json.loads(data)["model"]
        kind, prefix = model["type"], model.get("continuing_subword_prefix")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the tokenizer cannot be read ({error!r}): fetch it again") from error
    if kind != "BPE" or prefix not in (None, ""):
        raise CheckpointError(
            f"a tokenizer of kind {kind!r:.20} with prefix {prefix!r:.20}; only plain BPE is supported"
        )


class Tokenizer:
    """A model's tokenizer, made from its blob. Raises CheckpointError for a blob that cannot be used."""

    def __init__(self, blob: bytes) -> None:
        fields = _read_blob(blob)
        self._raw = parse_raw(json.dumps(fields["tokenizer"]).encode())
        self._raw.no_padding()
        self._raw.no_truncation()
        self.eos_ids: frozenset[int] = frozenset(fields["eos_ids"])
        self._template: ChatTemplate | None = None
        if fields["chat_template"] is not None:
            tokens = {name: fields[name] or "" for name in ("bos_token", "eos_token")}
            self._template = ChatTemplate(fields["chat_template"], tokens)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones included."""
        return self._raw.get_vocab_size()

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Token ids of ``text``.

        ``special`` adds the beginning-of-text token where the model wants one; a rendered chat brings its own.
        """
        return tuple(self._raw.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out; ids that are not in the vocabulary stand for nothing."""
        return self._raw.decode(list(ids), skip_special_tokens=True)

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt text for a chat, up to where the assistant's answer begins.

        Raises RequestError where the model has no chat template or the template refuses these messages.
        """
        if self._template is None:
            raise RequestError("this model has no chat template; send a plain prompt instead", param="messages")
        return self._template.render([{"role": message.role, "content": message.content} for message in messages])

    def stream(self) -> TextStream:
        """A fresh incremental detokenizer."""
        return TextStream(self)


class TextStream:
    """Turns token ids that arrive one by one into pieces of text; all pieces together are the full decoding.

    A piece never ends inside a character: what may be the beginning of one is held back, for at most ``HOLD_MOST``
    tokens (a model that emits bytes which never become text).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # ids emitted last: some decoders treat the first token of a text differently
        self._pending: list[int] = []
        self._shown = ""  # the text of _context

    def push(self, token: int) -> str:
        """Take the next id; return the text that is now certain, which may be empty."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._context + self._pending)
        if text.endswith(_REPLACEMENT) and len(self._pending) < HOLD_MOST:
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """The text still held back, at the end of the generation."""
        return self._emit(self._tokenizer.decode(self._context + self._pending)) if self._pending else ""

    def _emit(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._context, self._pending = self._pending, []
        self._shown = self._tokenizer.decode(self._context)
        return piece


def _read_blob(blob: bytes) -> dict[str, Any]:
    if len(blob) > MAX_BLOB:
        raise CheckpointError(f"a tokenizer of {len(blob)} bytes, where at most {MAX_BLOB} are allowed")
    try:
        fields = json.loads(blob)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the tokenizer blob is not JSON: {error}") from error
    if not isinstance(fields, dict) or fields.keys() != _FIELDS or not isinstance(fields["tokenizer"], dict):
        raise CheckpointError(f"the tokenizer blob is not an object of {', '.join(sorted(_FIELDS))}")
    if any(type(fields[name]) not in (str, type(None)) for name in ("chat_template", "bos_token", "eos_token")):
        raise CheckpointError("the tokenizer blob's template and special tokens are not text")
    ids = fields["eos_ids"]
    if not isinstance(ids, list) or len(ids) > MAX_EOS or any(type(index) is not int or index < 0 for index in ids):
        raise CheckpointError("the tokenizer blob's eos_ids are not a short list of token ids")
    return fields
