"""Texts and token ids, as the model's tokenizer has them: what vLLM answers, and lm-eval asks for."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import FastAPI, Request

from tpworker.server.dialect import Dialect
from tpworker.server.front import Front
from tpworker.server.leaving import unless_left
from tpworker.server.requests.tokenize import DetokenizeRequest, TokenizeRequest
from tpworker.server.shapes import GENERATES, TELLS, Text, TokenizerInfo, Tokens, documented
from tpworker.text.tokenizer import Tokenizer


def add_text(app: FastAPI, front: Front) -> None:
    """Adds the routes."""
    runtime = front.runtime

    @app.post("/tokenize", responses=documented(*GENERATES, ok=Tokens))
    async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        """The token ids of a text, or of a conversation."""
        front.admit(body.model)
        front.check_text("there is nothing to tokenise with", "prompt")
        work = partial(_ids_of, runtime.tokenizer, body, front.dialect)
        ids = await unless_left(request, runtime.prepare(work, num_requests=0, num_chars=body.num_chars))
        strings = [runtime.tokenizer.with_special.token(i) for i in ids] if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": runtime.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }

    @app.post("/detokenize", responses=documented(*GENERATES, ok=Text))
    async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
        """The text of token ids, special tokens included. Ids that the tokenizer has not are no text."""
        front.admit(body.model)
        front.check_text("there is no text in token ids", "tokens")
        work = partial(runtime.tokenizer.decode, body.tokens, skip_special_tokens=False)
        text = await unless_left(request, runtime.prepare(work, num_requests=0, num_chars=len(body.tokens)))
        return {"prompt": text}

    @app.get("/tokenizer_info", responses=documented(*TELLS, ok=TokenizerInfo))
    async def tokenizer_info() -> dict[str, Any]:
        """The tokenizer's class, special tokens and chat template, in the words of tokenizer_config.json."""
        front.admit(None)
        front.check_text("there is nothing to tell of", "model")
        return {**runtime.tokenizer.description, "model_max_length": runtime.max_model_len}


def _ids_of(tokenizer: Tokenizer, body: TokenizeRequest, dialect: Dialect) -> list[int]:
    if body.prompt is not None:
        return tokenizer.encode(body.prompt, body.add_special_tokens is not False)
    text = body.rendered(tokenizer, dialect, body.variables_for(dialect))
    return tokenizer.encode(text, bool(body.add_special_tokens))
