"""Building the tokenizer blob (see :mod:`blyan_node.model.tokenizer`) from what a checkpoint says about its text."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer

from blyan_node.errors import CheckpointError
from blyan_node.model.tokenizer import build_blob, parse_raw

# How text is cut before merging, by the name that GGUF files give it. Expressions: llama.cpp src/llama-vocab.cpp and
# the tokenizer.json of the models themselves.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF


def _by_expression(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if name == "llama-bpe":
        return _by_expression(_LLAMA3)
    if name == "qwen2":
        return _by_expression(_QWEN2)
    raise CheckpointError(f"GGUF pre-tokenizer {name!r} is not supported; import the Hugging Face directory instead")


def tokenizer_from_gguf(metadata: dict[str, Any]) -> bytes:
    """Build the blob from GGUF metadata: byte-level BPE only (``tokenizer.ggml.model`` gpt2)."""
    kind, name = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise CheckpointError(f"GGUF tokenizer {kind!r} is not supported; import the Hugging Face directory instead")
    tokens = _list(metadata, "tokenizer.ggml.tokens", str)
    types = _list(metadata, "tokenizer.ggml.token_type", int)
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "tokenizer.ggml.merges", str)]
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens) or any(len(pair) != 2 for pair in merges):
        raise CheckpointError("the GGUF file's vocabulary is inconsistent: fetch it again")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for pair in merges:
        if any(part not in vocabulary for part in (*pair, "".join(pair))):
            raise CheckpointError(f"the GGUF file merges {pair!r:.80}, which is not in its vocabulary: fetch it again")
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name == "llama-bpe"))
    if name == "qwen2":
        raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = _pre_tokenizer(name)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(_added(tokens, types, _CONTROL))
    raw.add_tokens(_added(tokens, types, _USER_DEFINED))
    bos, eos = _token(metadata, "bos", tokens), _token(metadata, "eos", tokens)
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", name == "llama-bpe"):
        raw.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, vocabulary[bos])]
        )
    template = metadata.get("tokenizer.chat_template")
    ends = [token for token in (eos, _token(metadata, "eot", tokens)) if token is not None]
    return build_blob(raw.to_str(), template, bos, eos, {vocabulary[token] for token in ends})


def _added(tokens: list[str], types: list[int], kind: int) -> list[AddedToken]:
    return [AddedToken(token, normalized=False) for token, type_ in zip(tokens, types, strict=True) if type_ == kind]


def _token(metadata: dict[str, Any], role: str, tokens: list[str]) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{role}_token_id")
    return tokens[index] if type(index) is int and 0 <= index < len(tokens) else None


def _list(metadata: dict[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(key)
    if not isinstance(values, list) or not values or type(values[0]) is not kind:
        raise CheckpointError(f"the GGUF file has no list {key}: it is incomplete, fetch it again")
    return values


def tokenizer_from_hf(
    raw: bytes, settings: dict[str, Any], template: str | None, configs: tuple[dict[str, Any], ...]
) -> bytes:
    """Build the blob from the files of a Hugging Face directory.

    ``raw`` is tokenizer.json, ``settings`` tokenizer_config.json, ``template`` the text of chat_template.jinja where
    there is one. ``configs`` are generation_config.json and config.json, asked in this order for ``eos_token_id``.
    """
    parsed = parse_raw(raw)
    bos, eos = _content(settings.get("bos_token")), _content(settings.get("eos_token"))
    ends: set[int] = set()
    for config in configs:
        value = config.get("eos_token_id")
        named = value if isinstance(value, list) else [value]
        ends = {index for index in named if type(index) is int}
        if ends:
            break
    if eos is not None and (index := parsed.token_to_id(eos)) is not None:
        ends.add(index)
    return build_blob(raw.decode(), template or _template(settings.get("chat_template")), bos, eos, ends)


def _content(token: Any) -> str | None:
    """The text of a special token, which is a string or an object with a ``content``."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _template(value: Any) -> str | None:
    """The chat template: a string, or the one named "default" of a list."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
