"""What pydantic finds in a body, as the error that a client gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpworker.errors import InvalidRequest
from tpworker.server.errors import ApiError, cut
from tpworker.server.requests.fields import UNSUPPORTED
from tpworker.server.requests.unsupported import REMEDIES


def describe_validation(errors: Sequence[Any]) -> ApiError:
    """What pydantic found in a body: all parameters that are not supported, or else the first error, with the
    field's name and its value."""
    if refused := [error for error in errors if error["type"] == UNSUPPORTED]:
        return _unsupported([_place(error["loc"]) for error in refused])
    error = errors[0]
    cause = error.get("ctx", {}).get("error")
    place = _place(error["loc"])
    if isinstance(cause, InvalidRequest):
        param = ".".join(part for part in (place, cause.parameter) if part)
        return ApiError(400, str(cause), param=param or None)
    if error["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not valid JSON: {cause} at character {error['loc'][-1]}", code="bad_json"
        )
    if not place:
        return ApiError(
            400,
            "the body must be a JSON object, with the header Content-Type: application/json",
            code="bad_json",
        )
    if error["type"] == "missing":
        return ApiError(400, f"{place} is missing", param=place)
    reason = (
        str(cause) if isinstance(cause, ValueError) else error["msg"].replace("Input should", "it should")
    )
    return ApiError(400, f"{place}={_shortened(error['input'])}: {reason}", param=place)


def _unsupported(names: Sequence[str]) -> ApiError:
    """All parameters that are not supported, in one error; `param` is the first."""
    if len(names) == 1:
        message = f"{names[0]} is not supported: leave it out"
    else:
        message = f"{', '.join(names[:-1])} and {names[-1]} are not supported: leave them out"
    for name in names:
        if remedy := REMEDIES.get(name.rpartition(".")[2]):
            message += f"; instead of {name}: {remedy}"
    return ApiError(400, message, param=names[0])


def _place(loc: Sequence[int | str]) -> str:
    """('body', 'messages', 0, 'content') → 'messages[0].content'."""
    place = ""
    for part in loc[1:]:
        if isinstance(part, str) and part.startswith("<"):  # which of several kinds it was taken for
            continue
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else part
    return place


def _shortened(value: object) -> str:
    return cut(repr(value), 80)
