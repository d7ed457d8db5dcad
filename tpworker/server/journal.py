"""What becomes known of one HTTP request, for the line of the log that tells of it when it has ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from tpworker.outputs import RequestRecord

_OUTCOMES = {2: "ok", 4: "invalid", 5: "failed", 429: "busy", 499: "disconnected", 503: "unavailable"}
_MAX_PARAM_CHARS = 64
_MICRO = 6  # digits of seconds


def outcome_of(status: int) -> str:
    """How a request ended, by the status of its answer; 0: there was none."""
    return _OUTCOMES.get(status) or _OUTCOMES.get(status // 100) or "disconnected"


class Entry:
    """One request, from its headers to its end. Whoever finds something out about it writes it here."""

    __slots__ = (
        "answer_id",
        "arrived",
        "error",
        "outcome",
        "param",
        "prompt",
        "records",
        "runtime_ids",
        "status",
        "stream",
    )

    def __init__(self) -> None:
        self.arrived = time.monotonic()
        self.status = 0
        """Of the answer; 0: none was begun."""
        self.outcome: str | None = None
        """How it ended, if the gate has said so."""
        self.error: str | None = None
        """The code of the error that its client was told, or would have been."""
        self.param: str | None = None
        """The parameter that was at fault."""
        self.answer_id: str | None = None
        """In its answer, if something is generated for it; so what is below."""
        self.runtime_ids: Sequence[str] = ()
        """What the runtime knows its prompts by."""
        self.stream = False
        self.prompt: str | None = None
        """As much of its first prompt as the log may show."""
        self.records: list[RequestRecord] = []
        """What the runtime said of each choice when it had ended."""

    def outcome_now(self) -> str:
        """How it ended: ok, invalid, busy, unavailable, failed or disconnected."""
        return self.outcome or outcome_of(self.status)

    @property
    def has_output(self) -> bool:
        """Whether the model has worked for it."""
        return any(record.num_output_tokens for record in self.records)

    def fields(self) -> dict[str, Any]:
        """What the log tells of it; None where there is nothing to tell."""
        told: dict[str, Any] = {"outcome": self.outcome_now()}
        if self.records:  # else it was refused
            told |= {"answer_id": self.answer_id, "stream": self.stream}
            told |= _counts(self.records) | _times(self.arrived, self.records)
        return told | {
            "total_s": round(time.monotonic() - self.arrived, _MICRO),
            "error": self.error,
            "param": self.param and self.param[:_MAX_PARAM_CHARS],
        }


def _counts(records: Sequence[RequestRecord]) -> dict[str, Any]:
    prompts = {record.request_id: record for record in records}  # each counts once, whatever its choices
    return {
        "prompts": len(prompts),
        "choices": len(records),
        "prompt_tokens": sum(record.num_prompt_tokens for record in prompts.values()),
        "cached_tokens": sum(record.num_cached_tokens for record in prompts.values()),
        "output_tokens": sum(record.num_output_tokens for record in records),
        "draft_tokens": sum(record.num_draft_tokens for record in records) or None,
        "accepted_tokens": sum(record.num_accepted_tokens for record in records) or None,
        "finish_reason": _finish_reasons(records),
        "restarts": max(record.num_resumed for record in records) or None,
    }


def _finish_reasons(records: Sequence[RequestRecord]) -> str:
    """That of all choices; where they differ, each with how many have it."""
    counts: dict[str, int] = {}
    for record in records:
        reason = record.finish_reason or "error"
        counts[reason] = counts.get(reason, 0) + 1
    if len(counts) == 1:
        return next(iter(counts))
    return ",".join(f"{reason}:{count}" for reason, count in counts.items())


def _times(arrived: float, records: Sequence[RequestRecord]) -> dict[str, float | None]:
    """How long it waited for its first step, to its first token, and between two tokens of a choice."""
    waits = [record.started - record.submitted for record in records if record.started is not None]
    firsts = [record.first_token for record in records if record.first_token is not None]
    decoding, num_more = 0.0, 0
    for record in records:
        if record.num_output_tokens > 1 and record.first_token is not None and record.last_token is not None:
            decoding += record.last_token - record.first_token
            num_more += record.num_output_tokens - 1
    return {
        "queue_s": round(max(waits), _MICRO) if waits else None,
        "ttft_s": round(min(firsts) - arrived, _MICRO) if firsts else None,
        "tpot_s": round(decoding / num_more, _MICRO) if num_more else None,
    }


current: ContextVar[Entry | None] = ContextVar("tpworker_journal", default=None)
"""That of the request which is being answered."""


def note_status(status: int) -> None:
    """The current request's answer begins with this status."""
    if (entry := current.get()) is not None:
        entry.status = status


def note_error(code: str, param: str | None) -> None:
    """The current request's client is told of an error, and of the parameter at fault."""
    if (entry := current.get()) is not None:
        entry.error, entry.param = code, param
