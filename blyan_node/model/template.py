"""Chat templates, run in a sandbox: they come with the model, so from a peer.

Jinja2's immutable sandbox keeps a template from Python's internals. A budget keeps it from running or growing without
end: each pass of a loop, each call and each 64 characters that an operation makes cost one step, operations that could
multiply text are checked beforehand or refused, and output stops at its limit. What templates see is otherwise what
transformers gives them (``trim_blocks``, ``raise_exception``, ``strftime_now``, ``tojson`` without HTML escapes).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from types import BuiltinMethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from blyan_node.errors import CheckpointError, RequestError

MAX_TEMPLATE = 256 * 1024
MAX_OUTPUT = 8 << 20  # characters
MAX_STEPS = 500_000
MAX_ITEMS = 100_000  # of a list, or a range
STEP_CHARACTERS = 64

_FILTERS = frozenset(
    {"abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items"}
    | {"last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round", "safe"}
    | {"select", "selectattr", "sort", "string", "title", "trim", "unique", "upper"}
)
_TEXT_METHODS = frozenset(
    {"capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "isspace", "lower"}
    | {"lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit"}
    | {"rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"}
)
# Names that no template can spell.
_EACH_PASS, _CONCATENATE = "each pass", "concatenate"
_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


class _Refusal(jinja2.TemplateError):
    """What ``raise_exception`` raises: the template does not accept these messages."""


class ChatTemplate:
    """A compiled chat template. One render at a time; raises CheckpointError for a template that cannot be used."""

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        if len(source) > MAX_TEMPLATE:
            raise CheckpointError(f"a chat template of {len(source)} characters, where {MAX_TEMPLATE} are allowed")
        self._environment = _Environment()
        self._variables = variables
        try:
            tree = _Bounding(self._environment).visit(self._environment.parse(source))
            code = self._environment.compile(tree)
            self._template = jinja2.Template.from_code(self._environment, code, self._environment.make_globals(None))
        except _FAULTS as error:
            raise CheckpointError(f"the model's chat template cannot be used: {error}") from error

    def render(self, messages: list[dict[str, str]]) -> str:
        """Render a chat up to where the assistant's answer begins.

        Raises RequestError where the template refuses these messages, CheckpointError where it fails or takes more
        than its budget.
        """
        self._environment.steps = MAX_STEPS
        size, pieces = 0, []
        try:
            for piece in self._template.generate(messages=messages, add_generation_prompt=True, **self._variables):
                size += len(piece)
                if size > MAX_OUTPUT:
                    raise CheckpointError("the model's chat template writes without end")
                pieces.append(piece)
        except _Refusal as error:
            raise RequestError(f"the model's chat template refuses: {error}", param="messages") from error
        except _FAULTS as error:
            raise CheckpointError(f"the model's chat template fails: {error}") from error
        return "".join(pieces)


class _Bounding(NodeTransformer):
    """Route every loop and every ``~`` through the environment's accounting."""

    def __init__(self, environment: _Environment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 (the visitor's naming)
        self.generic_visit(node)
        node.iter = self._filter(node.iter, _EACH_PASS)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return self._filter(nodes.List(node.nodes, lineno=node.lineno), _CONCATENATE)

    def _filter(self, operand: nodes.Node, name: str) -> nodes.Filter:
        made = nodes.Filter(operand, name, [], [], None, None, lineno=operand.lineno)
        made.set_environment(self._environment)
        return made


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a budget: ``steps`` left."""

    intercepted_binops = frozenset(["+", "*", "%", "**"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=_scalar)
        self.steps = MAX_STEPS
        kept = {name: self._charging(self.filters[name]) for name in _FILTERS}
        self.filters = kept | {
            "join": self._join,
            "replace": self._replace,
            "tojson": self._tojson,
            _EACH_PASS: self._each_pass,
            _CONCATENATE: self._join,
        }
        self.globals = {
            "range": self._range,
            "dict": dict,
            "namespace": self.globals["namespace"],
            "raise_exception": _refuse,
            "strftime_now": lambda layout: datetime.now().astimezone().strftime(str(layout)[:100]),
        }

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise jinja2.TemplateError("it takes more steps than are allowed")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _TEXT_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Treat ``format`` as any other method of text, so that the list above leaves it out."""

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(obj, BuiltinMethodType) and isinstance(obj.__self__, str) and obj.__name__ == "replace":
            return self._replace(obj.__self__, *args, **kwargs)
        self.spend(1)
        return self._charge(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator != "+" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise jinja2.TemplateError(f"'{operator}' is for numbers only")
        if operator == "**" or (isinstance(left, int) and abs(left) > 1 << 64):
            raise jinja2.TemplateError("numbers grow too large")
        return self._charge(super().call_binop(context, operator, left, right))

    def _charge(self, value: Any) -> Any:
        """Count what an operation made against the budget."""
        if isinstance(value, str):
            self.spend(1 + len(value) // STEP_CHARACTERS)
        elif isinstance(value, list | tuple | dict):
            self.spend(1 + len(value))
            if len(value) > MAX_ITEMS:
                raise jinja2.TemplateError("a list grows too long")
        return value

    def _charging(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # carries over what marks jinja's context filters
        def charged(*args: Any, **kwargs: Any) -> Any:
            return self._charge(function(*args, **kwargs))

        return charged

    def _each_pass(self, values: Iterable[Any]) -> Iterator[Any] | list[Any]:
        if isinstance(values, jinja2.Undefined):
            return []
        items = list(_capped(values))
        return _Passes(items, self)

    def _join(self, values: Iterable[Any], separator: str = "") -> str:
        parts = [str(_scalar(value)) for value in _capped(values)]
        self.spend(1 + (sum(map(len, parts)) + len(separator) * len(parts)) // STEP_CHARACTERS)
        return separator.join(parts)

    def _replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        times = text.count(old) if count < 0 else min(count, text.count(old))
        self.spend(1 + (len(text) + times * len(new)) // STEP_CHARACTERS)
        return text.replace(old, new, times)

    def _tojson(self, value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        pieces = []
        for piece in json.JSONEncoder(ensure_ascii=ensure_ascii, indent=min(indent or 0, 8) or None).iterencode(value):
            self.spend(1 + len(piece) // STEP_CHARACTERS)
            pieces.append(piece)
        return "".join(pieces)

    def _range(self, *bounds: int) -> range:
        values = range(*bounds)
        if len(values) > MAX_ITEMS:
            raise jinja2.TemplateError("a range is too long")
        return values


class _Passes(list[Any]):
    """A list of which every pass over an item costs a step. ``loop.length`` and the like go on working."""

    def __init__(self, items: list[Any], environment: _Environment) -> None:
        super().__init__(items)
        self._environment = environment

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self._environment.spend(1)
            yield item


def _capped(values: Iterable[Any]) -> Iterator[Any]:
    for index, value in enumerate(values):
        if index >= MAX_ITEMS:
            raise jinja2.TemplateError("a list grows too long")
        yield value


def _scalar(value: Any) -> Any:
    """Refuse to print lists and objects: a few nested ones can stand for endless text. ``tojson`` counts its own."""
    if isinstance(value, str | int | float | bool | jinja2.Undefined) or value is None:
        return value
    raise jinja2.TemplateError(f"it prints a {type(value).__name__}")


def _refuse(message: str) -> NoReturn:
    raise _Refusal(str(message)[:500])
