"""JSON schemas (2020-12, the dialect of OpenAPI 3.1) of what the API takes and gives."""

from __future__ import annotations

import types
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from blyan_node.api.endpoints import Schema
from blyan_node.api.keys import SCOPES
from blyan_node.api.requests import HARMLESS, MAX_MESSAGES, MAX_STOP, MAX_STOPS, MAX_TEXT, MAX_TOKENS, NEUTRAL
from blyan_node.api.siwe import MAX_MESSAGE
from blyan_node.inference.generation import Hop

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
ID: Schema = {"type": "string", "pattern": "^[0-9a-fA-F]{64}$"}
ADDRESS: Schema = {"type": "string", "pattern": "^0x[0-9a-fA-F]{40}$"}
AMOUNT: Schema = {"type": "string", "pattern": "^-?[0-9]+$", "description": "10^-9 BLY"}
WORD: Schema = {"enum": ["tentative", "final", "pending"]}


def record(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def list_of(item: Schema, **more: Any) -> Schema:
    """An array."""
    return {"type": "array", "items": item, **more}


def maybe(schema: Schema) -> Schema:
    """The same, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def page_of(item: Schema) -> Schema:
    """A page of a list; ``next`` is the ``after`` of the next page."""
    return record({"object": {"const": "list"}, "data": list_of(item), "next": maybe(STRING)})


def all_of(item: Schema) -> Schema:
    """A list that is not paged."""
    return record({"object": {"const": "list"}, "data": list_of(item)})


def schema_of(kind: Any) -> Schema:
    """The schema of a dataclass as ``asdict`` gives it out, by its type hints."""
    plain = {str: STRING, int: INTEGER, float: NUMBER, bool: BOOLEAN, types.NoneType: {"type": "null"}}
    if kind in plain:
        return plain[kind]
    if get_origin(kind) in (Union, types.UnionType):
        return {"anyOf": [schema_of(part) for part in get_args(kind)]}
    if get_origin(kind) is tuple:
        return list_of(schema_of(get_args(kind)[0]))
    hints = get_type_hints(kind)
    return record({each.name: schema_of(hints[each.name]) for each in fields(kind)})


ERROR = record(
    {"error": record({"message": STRING, "type": STRING, "param": maybe(STRING), "code": STRING}, {"partial": STRING})}
)

# --- what generates ---

_COMMON: dict[str, Schema] = {
    "model": {"type": "string", "maxLength": 256, "description": "of /v1/models; absent: the one that can run"},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2, "default": 1},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 1},
    "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "stop": {
        "anyOf": [
            {"type": "string", "minLength": 1, "maxLength": MAX_STOP},
            list_of({"type": "string", "minLength": 1, "maxLength": MAX_STOP}, maxItems=MAX_STOPS),
        ]
    },
}
_OPENAI: dict[str, Schema] = _COMMON | {
    "stream": {"type": "boolean", "default": False},
    "n": {"const": 1},
}
_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {
            "anyOf": [
                STRING,
                list_of(
                    {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": STRING},
                        "required": ["type", "text"],
                    },
                    minItems=1,
                ),
            ]
        },
    },
    "required": ["role", "content"],
}


def _request(required: dict[str, Schema], optional: dict[str, Schema]) -> Schema:
    """A body whose optional fields may be null, and which may hold what OpenAI's clients send out of habit."""
    habits: dict[str, Schema] = {name: {"enum": list(values)} for name, values in NEUTRAL.items()}
    ignored: dict[str, Schema] = {name: {"description": "ignored"} for name in sorted(HARMLESS)}
    nullable = {name: maybe(schema) for name, schema in (habits | optional).items()}
    return record(required, ignored | nullable)


def _streamed(body: Schema) -> Schema:
    """The same body, which may ask for the usage only if it asks for a stream."""
    options = {"type": "object", "properties": {"include_usage": maybe(BOOLEAN)}}
    body = body | {"properties": body["properties"] | {"stream_options": maybe(options)}}
    not_streamed = {"properties": {"stream": {"enum": [False, None]}}}
    return body | {"if": not_streamed, "then": {"properties": {"stream_options": {"type": "null"}}}}


CHAT_REQUEST = _request({"prompt": _TEXT}, _COMMON)
CHAT_COMPLETION_REQUEST = _streamed(
    _request(
        {"messages": list_of(_MESSAGE, minItems=1, maxItems=MAX_MESSAGES)},
        _OPENAI | {"max_completion_tokens": _COMMON["max_tokens"]},
    )
)
COMPLETION_REQUEST = _streamed(
    _request(
        {"prompt": {"anyOf": [_TEXT, list_of(_TEXT, minItems=1, maxItems=1)]}}, _OPENAI | {"best_of": {"const": 1}}
    )
)

_ROUTE = list_of(schema_of(Hop))
_REASON: Schema = {"enum": ["stop", "length"]}
_USAGE = record({"prompt_tokens": INTEGER, "completion_tokens": INTEGER, "total_tokens": INTEGER})


def _completion(kind: str, choice: dict[str, Schema]) -> Schema:
    whole: dict[str, Schema] = {"index": {"const": 0}, "logprobs": {"type": "null"}, "finish_reason": _REASON}
    return record(
        {
            "id": STRING,
            "object": {"const": kind},
            "created": INTEGER,
            "model": STRING,
            "choices": list_of(record(whole | choice), minItems=1, maxItems=1),
            "usage": _USAGE,
            "blyan": record({"route": _ROUTE, "first_token_ms": NUMBER, "latency_ms": NUMBER}),
        }
    )


EVENT: Schema = {"type": "object", "properties": {"data": STRING}, "required": ["data"]}
"""Of a stream: each event's data is a chunk as JSON, and the last one's is [DONE]."""
CHAT_COMPLETION = _completion(
    "chat.completion",
    {"message": record({"role": {"const": "assistant"}, "content": STRING, "refusal": {"type": "null"}})},
)
COMPLETION = _completion("text_completion", {"text": STRING})
CHAT_ANSWER = record(
    {
        "text": STRING,
        "tokens_used": INTEGER,
        "nodes_used": list_of(STRING),
        "latency_ms": NUMBER,
        "cost_bly": NUMBER,
        "cost_nano": INTEGER,
        "model": STRING,
        "route": _ROUTE,
        "finish_reason": _REASON,
    }
)
TERMS = record(
    {
        "models": list_of(STRING),
        "price": record({"bly_per_token": NUMBER, "nano_per_token": INTEGER}),
        "limits": record(
            {
                "requests_per_minute": INTEGER,
                "concurrent": INTEGER,
                "prompt_characters": INTEGER,
                "body_bytes": INTEGER,
                "tokens_per_day": maybe(INTEGER),
            }
        ),
    }
)

# --- the node ---

HEALTH = record({"live": BOOLEAN, "ready": BOOLEAN, "why": maybe(STRING)})
MODELS = all_of(
    record(
        {
            "id": STRING,
            "object": {"const": "model"},
            "created": INTEGER,
            "owned_by": STRING,
            "context_length": INTEGER,
            "missing": list_of(STRING),
        }
    )
)
IMPORT_REQUEST = record(
    {"path": {"type": "string", "minLength": 1, "maxLength": 4096}},
    {"name": maybe({"type": "string", "maxLength": 64})},
)

VERIFY_REQUEST = record({})
VERIFIED = record({"verified": list_of(STRING)})

# --- signing in ---

NONCE = record({"nonce": STRING, "domain": STRING, "uri": STRING, "chain_id": INTEGER, "expires_in": INTEGER})
SIWE_REQUEST = record(
    {
        "message": {"type": "string", "minLength": 1, "maxLength": MAX_MESSAGE},
        "signature": {"type": "string", "minLength": 1, "maxLength": 132},
    }
)
TOKEN = record({"token": STRING, "address": ADDRESS, "expires_in": INTEGER, "scopes": list_of({"enum": list(SCOPES)})})

# --- the chain ---

BLOCK_FIELDS = {
    "id": ID,
    "chain": {"enum": ["A", "B", "T"]},
    "type": STRING,
    "author": ADDRESS,
    "seq": INTEGER,
    "height": INTEGER,
    "parents": list_of(ID),
    "anchor": record({"k": INTEGER, "cut": ID}),
    "timestamp_ms": INTEGER,
    "size": INTEGER,
    "word": WORD,
    "cut": maybe(INTEGER),
}
_STANDING = {"word": WORD, "void": maybe(STRING)}
_RECORD = record(
    {
        "id": ID,
        "kind": STRING,
        "sender": ADDRESS,
        "nonce": INTEGER,
        "fee_nano": AMOUNT,
        "expires_at_cut": maybe(INTEGER),
        "arguments": {"type": ["object", "string"]},
    }
    | _STANDING
)
BLOCKS = page_of(record(BLOCK_FIELDS | {"records": INTEGER}))
BLOCK = record(BLOCK_FIELDS | {"records": list_of(_RECORD)})
CUTS = page_of(
    record(
        {
            "k": INTEGER,
            "id": ID,
            "prev_cut": ID,
            "heads": list_of(ID),
            "prev_state_root": ID,
            "round": INTEGER,
            "signers": list_of(ADDRESS),
            "stake_nano": AMOUNT,
            "total_nano": AMOUNT,
        }
    )
)
_HOLDING = record(
    {"k": INTEGER, "balance_nano": AMOUNT, "nonce": INTEGER, "bonded_nano": AMOUNT, "unbonding_nano": AMOUNT}
)
BALANCE = record(
    {
        "address": ADDRESS,
        "final": _HOLDING,
        "tentative": _HOLDING,
        "next_nonce": INTEGER,
        "bonds": list_of(record({"validator": ADDRESS, "amount_nano": AMOUNT})),
    }
)
MOVEMENTS = page_of(
    record(
        {
            "word": WORD,
            "k": INTEGER,
            "kind": STRING,
            "record": STRING,
            "other": maybe(ADDRESS),
            "amount_nano": AMOUNT,
            "fee_nano": AMOUNT,
            "balance_nano": AMOUNT,
        }
    )
)
STANDING = record({"id": ID} | _STANDING)
SUBMITTED = record({"id": ID, "word": WORD})
SUBMIT_REQUEST = record({"record": {"type": "string", "pattern": "^([0-9a-fA-F]{2})+$"}})
VALIDATORS = record(
    {
        "k": INTEGER,
        "total_nano": AMOUNT,
        "quorum_nano": AMOUNT,
        "data": list_of(
            record(
                {
                    "address": ADDRESS,
                    "stake_nano": AMOUNT,
                    "next_stake_nano": AMOUNT,
                    "here": BOOLEAN,
                    "connected": BOOLEAN,
                    "behind": maybe(INTEGER),
                }
            )
        ),
        "slashed": list_of(ADDRESS),
        "missing": list_of(ADDRESS),
    }
)
NETWORK = record(
    {
        "name": STRING,
        "network": ID,
        "created_ms": INTEGER,
        "parameters": {"type": "object"},
        "supply_nano": AMOUNT,
        "final": record({"k": INTEGER, "cut": ID, "state_root": ID}),
        "genesis": STRING,
        "pending": INTEGER,
    }
)
