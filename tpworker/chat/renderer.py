"""Renders a model's chat template in processes of their own, which are bounded in time, memory and text.

A template is a program that came with a model and runs on what clients send. In this process it could hold
every other request up, take all memory, and keep the process from ending; a thread cannot be stopped. So
process.py runs it: started with the first conversation, kept for the next ones, replaced when it was ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from tpworker.bounded.frames import pack
from tpworker.bounded.pool import Bounds, Cause, Closed, Ended, NotReady, Pool
from tpworker.chat.answers import FAILED, REFUSED, TEXT, TOO_LONG
from tpworker.errors import InvalidRequest, RuntimeStopped

MAX_RENDERERS = 2
"""Processes of one template: while a conversation takes its time, others have another way."""
MAX_SECONDS = 5.0
"""Of CPU time, for one conversation."""
MAX_MEMORY = 512 << 20
"""Bytes, beyond the 20 MB that the process begins with."""
MAX_CHARS = 1 << 25
"""Of a rendered conversation: 8 for each token of the longest sequence that there can be."""

logger = logging.getLogger(__name__)

_WITHOUT = "or use /v1/completions, where you write the prompt yourself"
_STOPPED = "the runtime was stopped while a conversation was rendered"
_REFUSALS = {
    REFUSED: "the model's chat template refuses these messages: {}",
    FAILED: "the model's chat template fails on these messages: {}",
    TOO_LONG: f"the conversation has more than {MAX_CHARS} characters, the limit: shorten the messages",
}

T = TypeVar("T")


class TemplateRenderer:
    """Renders one template, for any number of threads.

    Args:
        template: its source.
        special_tokens: variables for it, e.g. `bos_token`.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        start = {"template": template, "special_tokens": dict(special_tokens), "max_chars": MAX_CHARS}
        self._bounds = Bounds(
            max_processes=MAX_RENDERERS,
            max_seconds=MAX_SECONDS,
            max_start_seconds=MAX_SECONDS,
            max_memory=MAX_MEMORY,
        )
        self._pool = Pool("tpworker.chat.process", lambda: start, self._bounds)

    def render(
        self, messages: Sequence[Mapping[str, Any]], context: Mapping[str, Any], variables: Mapping[str, Any]
    ) -> str:
        """The text of a conversation.

        Args:
            messages: plain data, as JSON has it; content as a string or as parts, see content.py.
            context: what every template gets besides them.
            variables: what the client adds.

        Raises:
            InvalidRequest: the template refuses it, fails, or goes beyond its bounds.
            RuntimeStopped: it was closed.
        """
        frame = _packed(messages, context, variables)
        kind, text = self._within_bounds(lambda: self._pool.ask(frame))
        if kind == TEXT:
            return str(text)
        raise InvalidRequest(_REFUSALS[kind].format(text), "messages")

    def check(self) -> None:
        """Starts a process, so that a template that is broken is found before any conversation.

        Raises:
            InvalidRequest: it is broken.
        """
        self._within_bounds(self._pool.check)

    def close(self) -> None:
        """Ends the processes; whoever waits for one gets `RuntimeStopped`. May be called more than once."""
        self._pool.close()

    def _within_bounds(self, work: Callable[[], T]) -> T:
        """What the pool gives; its errors in our words."""
        try:
            return work()
        except Closed:
            raise RuntimeStopped(_STOPPED) from None
        except NotReady as error:
            broken = f"the model's chat template is broken: {error.answer}: mend it, {_WITHOUT}"
            if error.is_news:
                logger.error("%s", broken)
            raise InvalidRequest(broken, "messages") from None
        except Ended as error:
            raise InvalidRequest(self._why(error), "messages") from None

    def _why(self, error: Ended) -> str:
        bounds = self._bounds
        if error.cause is Cause.SILENCE:
            return (
                f"the process that renders chat templates has not answered for {bounds.max_waits} s: "
                "try again"
            )
        what = f"came to no end, its process was ended {error.how}"
        if error.cause is Cause.TIME:
            what = f"took more than {bounds.max_seconds:g} s of processor time, the limit"
        elif error.cause is Cause.MEMORY:
            what = f"needed more than {bounds.max_memory >> 20} MiB of memory, the limit"
        return f"the model's chat template {what}: shorten the messages, {_WITHOUT}"


def _packed(
    messages: Sequence[Mapping[str, Any]], context: Mapping[str, Any], variables: Mapping[str, Any]
) -> bytes:
    try:
        return pack({"messages": list(messages), "context": dict(context), "variables": dict(variables)})
    except (TypeError, ValueError, OverflowError) as error:
        name = "messages" if _can_be_packed(variables) else "chat_template_kwargs"
        raise InvalidRequest(
            f"{name}: {error}: a chat template takes plain data, as JSON has it, with integers of at most "
            "64 bits, nested at most a few hundred deep",
            name,
        ) from error


def _can_be_packed(variables: Mapping[str, Any]) -> bool:
    try:
        pack({"variables": dict(variables)})
    except (TypeError, ValueError, OverflowError):
        return False
    return True
