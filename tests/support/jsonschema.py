"""The part of JSON Schema (2020-12) that our OpenAPI document uses; an unknown keyword is an error."""

from __future__ import annotations

import re
from typing import Any

_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
_NOTES = {"description", "default", "required", "then"}


def faults(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """What is wrong with a value."""
    found: list[str] = []
    for keyword, wanted in schema.items():
        match keyword:
            case "type":
                names = [wanted] if isinstance(wanted, str) else wanted
                if not any(_is(value, name) for name in names):
                    return [f"{where}: {value!r} is no {wanted}"]
            case "const":
                found += [] if value == wanted else [f"{where}: {value!r} is not {wanted!r}"]
            case "enum":
                found += [] if value in wanted else [f"{where}: {value!r} is none of {wanted!r}"]
            case "anyOf":
                if all(faults(value, each, where) for each in wanted):
                    found.append(f"{where}: {value!r} fits none of {wanted}")
            case "if":
                if not faults(value, wanted, where):
                    found += faults(value, schema["then"], where)
            case "properties" if isinstance(value, dict):
                found += [f"{where}: {name} is missing" for name in schema.get("required", ()) if name not in value]
                for name in value.keys() & wanted.keys():
                    found += faults(value[name], wanted[name], f"{where}.{name}")
            case "additionalProperties":
                found += [f"{where}: {name} is not described" for name in value.keys() - schema["properties"].keys()]
            case "items":
                for index, item in enumerate(value):
                    found += faults(item, wanted, f"{where}[{index}]")
            case "pattern":
                found += [] if re.search(wanted, value) else [f"{where}: {value!r} does not match {wanted}"]
            case "minimum" | "exclusiveMinimum" | "maximum" | "minLength" | "maxLength" | "minItems" | "maxItems":
                found += [] if _within(value, keyword, wanted) else [f"{where}: {keyword} is {wanted}"]
            case other if other not in _NOTES:
                raise NotImplementedError(other)
    return found


def _is(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def _within(value: Any, keyword: str, bound: float) -> bool:
    size = len(value) if keyword.endswith(("Length", "Items")) else value
    return size > bound if keyword.startswith("exclusive") else size >= bound if "min" in keyword else size <= bound
