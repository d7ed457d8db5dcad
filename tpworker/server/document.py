"""The OpenAPI document: what FastAPI makes of the routes, and what it cannot know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from tpworker.outputs import UP
from tpworker.server.gate import is_guarded
from tpworker.server.ignored import HEADER as IGNORED
from tpworker.server.request_ids import HEADER as REQUEST_ID
from tpworker.server.requests.fields import TOKEN_ID
from tpworker.values import MAX_SEED

if TYPE_CHECKING:
    from tpworker.runtime.runtime import Runtime

_KEY = "key"
_HEADERS = {
    REQUEST_ID: ("The request's id: the client's own, or one that the server made.", True),
    IGNORED: ("What the body holds that is not known here, and has no effect.", False),
}


def complete(app: FastAPI, runtime: Runtime, has_key: bool) -> None:
    """Has an app's document say what is true of all of its routes, and of the model, once that is known.

    Args:
        has_key: whether clients must send one.
    """
    made_by_fastapi = app.openapi

    def openapi() -> dict[str, Any]:
        app.openapi_schema = None  # what FastAPI keeps, lacks what is added here
        document = made_by_fastapi()
        _correct(document, has_key)
        is_known = runtime.health().state in UP
        _mend_numbers(document, runtime.vocab_size - 1 if is_known else TOKEN_ID["maximum"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _correct(document: dict[str, Any], has_key: bool) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            responses.pop("422", None)  # FastAPI's own, which are 400 here
            if not has_key:
                responses.pop("401", None)
            elif is_guarded(path):
                operation["security"] = [{_KEY: []}]
            for response in responses.values():
                response["headers"] = {
                    name: {"description": text, "required": required, "schema": {"type": "string"}}
                    for name, (text, required) in _HEADERS.items()
                }
    components = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    if has_key:
        components["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}


def _mend_numbers(node: Any, highest_id: int) -> None:
    """Bounds as integers, where they are; of FastAPI they come as floats, of which 2**63 - 1 is none.

    Args:
        highest_id: of the model's tokens.
    """
    if isinstance(node, list):
        for one in node:
            _mend_numbers(one, highest_id)
    elif isinstance(node, dict):
        for name, one in node.items():
            if name in ("minimum", "maximum", "exclusiveMinimum") and isinstance(one, float):
                node[name] = MAX_SEED if one == 2.0**63 else int(one) if one.is_integer() else one
            else:
                _mend_numbers(one, highest_id)
        if node.get("title") == TOKEN_ID["title"]:
            node["maximum"] = highest_id
