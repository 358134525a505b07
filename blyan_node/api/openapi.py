"""The OpenAPI document, made from the table of endpoints, so that it cannot tell what is not so."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from blyan_node import __version__
from blyan_node.api.endpoints import JSON, Endpoint, Schema
from blyan_node.api.schemas import ERROR

_KEYS: list[dict[str, list[str]]] = [{"bearer": []}, {"header": []}]


def document(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """Return the document (OpenAPI 3.1) of a table of endpoints."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {"title": "blyan-node", "version": __version__, "summary": "One language model on many machines."},
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def statuses(endpoint: Endpoint) -> tuple[int, ...]:
    """All errors that an endpoint may answer with."""
    found = {401, 403, 429, *endpoint.errors}  # a wrong key, or a foreign origin, is refused on public paths too
    if endpoint.parameters:
        found.add(400)
    if endpoint.body is not None:
        found |= {400, 408, 413, 415}
    if endpoint.generates:
        found |= {404, 502, 503}
    return tuple(sorted(found))


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    in_path = {name for name in (each.name for each in endpoint.parameters) if f"{{{name}}}" in endpoint.path}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "security": _KEYS if endpoint.scope is not None else [{}, *_KEYS],
        "responses": {
            str(endpoint.status): {
                "description": HTTPStatus(endpoint.status).phrase,
                "content": {media: {"schema": schema} for media, schema in endpoint.answers.items()},
            }
        }
        | {str(status): _failure(status) for status in statuses(endpoint)},
    }
    if endpoint.scope is not None:
        operation["description"] = f"Needs a key with scope {endpoint.scope}."
    if endpoint.parameters:
        operation["parameters"] = [
            {
                "name": each.name,
                "in": "path" if each.name in in_path else "query",
                "required": each.name in in_path or each.required,
                "description": each.meaning,
                "schema": each.schema,
            }
            for each in endpoint.parameters
        ]
    if endpoint.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": endpoint.body}}}
    return operation


def _failure(status: int) -> dict[str, Any]:
    schema: Schema = {"$ref": "#/components/schemas/Error"}
    failure: dict[str, Any] = {"description": HTTPStatus(status).phrase, "content": {JSON: {"schema": schema}}}
    if status in (429, 503):
        failure["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
    return failure
