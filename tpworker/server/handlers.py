"""Every exception that a route may raise, as the answer that says so."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Match

from tpworker.errors import TpworkerError
from tpworker.server.absent import why_absent
from tpworker.server.errors import ApiError, describe, internal_error
from tpworker.server.leaving import ClientLeft
from tpworker.server.refusals import describe_validation


def add_handlers(app: FastAPI) -> None:
    """Has the app answer them in the OpenAI API's form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return describe_validation(error.errors()).as_response()

    @app.exception_handler(ClientLeft)
    async def left(request: Request, error: ClientLeft) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(TpworkerError)
    async def refused(request: Request, error: TpworkerError) -> Response:
        described = describe(error)
        if described is None:
            raise error
        return described.as_response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        path, code = request.scope["path"], None
        if error.status_code == 404:
            message, code = f"there is no {path} here", "not_found"
            if why := why_absent(path.removeprefix(request.scope.get("root_path", ""))):
                message, code = f"{message}: {why}", "unsupported_endpoint"
            message += "; /docs shows what there is"
        elif error.status_code == 405:
            message, code = f"{request.method} is not for {path}: see /docs", "method_not_allowed"
        elif error.status_code == 400:
            message = (
                "the body is not valid JSON that can be read: not UTF-8, nested too deeply, or with a number "
                f"of more than {sys.get_int_max_str_digits()} digits"
            )
        else:
            message = str(error.detail)
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_allowed(request))  # starlette tells those of one route only
        return ApiError(error.status_code, message, code=code, headers=headers).as_response()

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return internal_error().as_response()  # starlette raises it again, so that it is logged


def _allowed(request: Request) -> list[str]:
    """The methods that its path is for."""
    routes: Sequence[BaseRoute] = request.app.routes
    here = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in here for method in getattr(route, "methods", None) or ()}
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))
