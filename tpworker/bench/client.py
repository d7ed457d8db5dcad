"""One request: what is sent, and what comes back piece by piece."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from tpworker.bench.connection import Pool, RequestLost, Response
from tpworker.bench.records import Record
from tpworker.errors import printable

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_MOST_TOKENS = 1 << 40  # nobody has more; and figures of them are floats
_WORDS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")


class AnswerReader:
    """Takes the events of one answer, and notes when its pieces came.

    Args:
        record: what is known of the request; changed.
        keeps_text: whether its text is wanted.
    """

    def __init__(self, record: Record, keeps_text: bool = False) -> None:
        self._record = record
        self._texts: list[str] | None = [] if keeps_text else None
        self._num_pieces = 0
        self._ended: float | None = None
        self._is_whole = False  # its end has been told
        self._usage: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """What has come of it, if it is wanted."""
        return "".join(self._texts or ())

    def on_event(self, event: bytes, now: float) -> None:
        """One event of the stream."""
        if not event.startswith(b"data:"):
            if b"\ndata:" not in event:
                return  # a comment, as a sign of life
            event = event[event.index(b"\ndata:") + 1 :]
        data = event[5:].strip()
        if data == b"[DONE]":
            self._is_whole = True
            return
        try:
            told = json.loads(data)
            if "error" in told:
                raise RequestLost(_kind(told["error"]))
            for choice in told.get("choices", ()):
                self._take(choice, now)
            if told.get("usage"):
                self._usage = told["usage"]
        except (ValueError, TypeError, AttributeError, RecursionError):
            self._record.error = self._record.error or "event that is not OpenAI's"
        except RequestLost as error:
            self._record.error = self._record.error or str(error)

    def _take(self, choice: dict[str, Any], now: float) -> None:
        record = self._record
        self._ended = now
        self._is_whole = self._is_whole or choice.get("finish_reason") is not None
        delta = choice.get("delta")
        if delta is None:
            text = choice.get("text") or ""
            is_piece = bool(text) or choice.get("finish_reason") is None  # where there is no tokenizer
        else:
            text = delta.get("content") or ""
            is_piece = any(delta.get(word) for word in _WORDS)
        if is_piece:
            if record.first is None:
                record.first = now
            elif record.last is not None:
                record.intervals.append(now - record.last)
            record.last = now
            self._num_pieces += 1
            if self._texts is not None:
                self._texts.append(text)

    def close(self, response: Response) -> None:
        """The answer is whole."""
        record = self._record
        if response.status != 200:
            record.error = f"status {response.status}"
            return
        if not response.is_stream:
            record.error = "answer that is no stream"
            return
        if record.error is None:
            record.error = self._what_is_missing()
        if record.first is None:  # all that came was its end, as of a token that is no text
            record.first = record.last = self._ended
        usage = self._usage
        record.is_counted = usage is not None
        if usage is None:
            record.num_output = self._num_pieces
            return
        try:
            record.num_output = count_of(usage.get("completion_tokens"))
            record.num_prompt = count_of(usage.get("prompt_tokens"))
            record.num_cached = count_of((usage.get("prompt_tokens_details") or {}).get("cached_tokens"))
        except (ValueError, AttributeError):
            record.error = record.error or "usage that is no numbers of tokens"

    def _what_is_missing(self) -> str | None:
        if self._ended is None:
            return "stream without output"
        return None if self._is_whole else "stream that ends before its output does"


def count_of(told: Any) -> int:
    """A number of tokens as a server tells it. Raises ValueError: it can be none."""
    if told is None:
        return 0
    if type(told) is not int or not 0 <= told <= _MOST_TOKENS:
        raise ValueError("no number of tokens")
    return told


def _kind(error: Any) -> str:
    kind = error.get("code") or error.get("type") if isinstance(error, dict) else None
    return f"error in the stream: {printable(str(kind)[:60])}" if kind else "error in the stream"


async def perform(
    pool: Pool, path: str, body: bytes, record: Record, timeout: float, keeps_text: bool = False
) -> str:
    """Sends a request, and waits for its end, whatever that is: the record tells. Returns its text, if
    that is wanted.

    Args:
        pool: to its server.
        path: of the endpoint.
        body: JSON.
        record: of it, with what is known so far.
        timeout: seconds for all of it.
    """
    reader = AnswerReader(record, keeps_text)
    record.sent = time.monotonic()
    try:
        async with asyncio.timeout(timeout):
            response = await pool.ask("POST", path, body, reader.on_event)
        reader.close(response)
    except RequestLost as error:
        record.error = record.error or str(error)
    except TimeoutError:
        record.error = "timeout"
    record.ended = time.monotonic()
    return reader.text


async def fetch(
    pool: Pool, method: str, path: str, body: Any = None, timeout: float = 60.0
) -> tuple[int, Any]:
    """An answer in JSON, whole: its status, and what it says; None if that is no JSON.

    Raises:
        RequestLost: there is none.
    """
    data = b"" if body is None else json.dumps(body).encode()
    try:
        async with asyncio.timeout(timeout):
            response = await pool.ask(method, path, data, lambda event, now: None)
    except TimeoutError:
        raise RequestLost(f"no answer within {timeout:g} s") from None
    try:
        return response.status, json.loads(bytes(response.body))
    except (ValueError, RecursionError):
        return response.status, None
