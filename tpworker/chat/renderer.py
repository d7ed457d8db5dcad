"""Renders a model's chat template in processes of their own, which are bounded in time, memory and text.

A template is a program that came with a model and runs on what clients send. In this process it could hold
every other request up, take all memory, and keep the process from ending; a thread cannot be stopped. So
process.py runs it: started with the first conversation, kept for the next ones, replaced when it was ended.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from tpworker.chat.frames import (
    BROKEN,
    FAILED,
    NO_MEMORY_STATUS,
    REFUSED,
    TEXT,
    TOO_LONG,
    pack,
    receive,
)
from tpworker.errors import InvalidRequest, RuntimeStopped
from tpworker.ipc.spawn import child_environment, log_descriptor

MAX_RENDERERS = 2
"""Processes of one template: while a conversation takes its time, others have another way."""
MAX_SECONDS = 5.0
"""Of CPU time, for one conversation: time in which nobody ran, on a busy machine or a paused one, is free."""
MAX_MEMORY = 512 << 20
"""Bytes, beyond the 20 MB that the process begins with."""
MAX_CHARS = 1 << 25
"""Of a rendered conversation: 8 for each token of the longest sequence that there can be."""
MAX_WAITS = 60
"""Seconds that we were awake, and no answer came: it was stopped, or does not get to run at all."""

logger = logging.getLogger(__name__)

_WITHOUT = "or use /v1/completions, where you write the prompt yourself"
_STOPPED = "the runtime was stopped while a conversation was rendered"
_REFUSALS = {
    REFUSED: "the model's chat template refuses these messages: {}",
    FAILED: "the model's chat template fails on these messages: {}",
    TOO_LONG: f"the conversation has more than {MAX_CHARS} characters, the limit: shorten the messages",
}

T = TypeVar("T")
V = TypeVar("V")


class TemplateRenderer:
    """Renders one template, for any number of threads.

    Args:
        template: its source.
        special_tokens: variables for it, e.g. `bos_token`.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        self._start = {
            "template": template,
            "special_tokens": dict(special_tokens),
            "max_memory": MAX_MEMORY,
            "max_seconds": MAX_SECONDS,
            "max_chars": MAX_CHARS,
        }
        self._lock = threading.Lock()
        self._places = threading.Semaphore(MAX_RENDERERS)
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._broken: str | None = None
        self._closed = False
        # Whoever drops it with its tokenizer instead of closing it leaves nothing behind either.
        self._finalizer = weakref.finalize(self, _end_all, self._idle)

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
        with self._places:
            kind, text = self._answer(frame)
        if kind == TEXT:
            return str(text)
        raise InvalidRequest(_REFUSALS[kind].format(text), "messages")

    def check(self) -> None:
        """Starts a process, so that a template that is broken is found before any conversation.

        Raises:
            InvalidRequest: it is broken.
        """
        with self._places:
            process = self._take()
            with self._lock:
                self._busy.discard(process)
                self._idle.append(process)

    def close(self) -> None:
        """Ends the processes; whoever waits for one gets `RuntimeStopped`. May be called more than once."""
        with self._lock:
            self._closed = True
            for process in self._busy:
                process.kill()
            _end_all(self._idle)

    def _answer(self, frame: bytes) -> Any:
        """A process's answer. One that somebody killed while it was idle is no fault of this conversation."""
        while True:
            process = self._take()
            try:
                answer = self._ask(process, frame)
            except _Killed:
                if not process.is_used:
                    raise
                continue
            with self._lock:
                process.is_used = True
                self._busy.discard(process)
                if not self._closed:
                    self._idle.append(process)
                    return answer
            process.end()
            return answer

    def _take(self) -> _Process:
        """A process that has compiled the template and does nothing."""
        with self._lock:
            if self._closed:
                raise RuntimeStopped(_STOPPED)
            if self._broken is not None:
                raise InvalidRequest(self._broken, "messages")
            while self._idle:
                process = self._idle.pop()
                if process.lives:
                    self._busy.add(process)
                    return process
                process.end()
            process = _Process()
            self._busy.add(process)
        kind, why = self._ask(process, pack(self._start))
        if kind == BROKEN:
            self._broken = f"the model's chat template is broken: {why}: mend it, {_WITHOUT}"
            logger.error("%s", self._broken)
            self._end(process)
            raise InvalidRequest(self._broken, "messages")
        return process

    def _ask(self, process: _Process, frame: bytes) -> Any:
        """An answer; a process that has none is ended."""
        try:
            return process.ask(frame)
        except BaseException as error:
            self._end(process)
            if self._closed:
                raise RuntimeStopped(_STOPPED) from None
            logger.info("%s", error)
            raise

    def _end(self, process: _Process) -> None:
        with self._lock:
            self._busy.discard(process)
        process.end()


class _Killed(InvalidRequest):
    """A process was ended by somebody else."""


class _Process:
    """One process, and the channel to it. It belongs to one thread at a time, but any may kill it."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "tpworker.chat.process"],
                    stdin=theirs.fileno(),
                    stdout=log_descriptor(),  # our own standard output may be somebody's data
                    env=child_environment("cpu"),
                    start_new_session=True,  # keys typed in a terminal are for us
                )
            except BaseException:
                self._channel.close()
                raise
        self._channel.settimeout(1.0)
        self.is_used = False
        """Whether it has answered a conversation."""

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def ask(self, frame: bytes) -> Any:
        """The answer to a frame.

        Raises:
            InvalidRequest: it ended over it.
        """
        rest = memoryview(frame)
        try:
            while rest:
                rest = rest[self._awake(self._channel.send, rest) :]
        except (BrokenPipeError, ConnectionResetError):
            answer = None
        else:
            answer = receive(self.recv)
        if answer is None:
            raise _why_ended(self._process.wait())
        return answer

    def recv(self, size: int) -> bytes:
        """At most so many bytes; none at the end of the stream."""
        try:
            return self._awake(self._channel.recv, size)
        except ConnectionResetError:
            return b""

    def _awake(self, call: Callable[[V], T], value: V) -> T:
        """What a call on the channel gives. Seconds are counted, so that one in which we slept is one."""
        for _ in range(MAX_WAITS):
            with contextlib.suppress(TimeoutError):
                return call(value)
        raise InvalidRequest(
            f"the process that renders chat templates has not answered for {MAX_WAITS} s: try again",
            "messages",
        )

    def kill(self) -> None:
        """Nothing if it is dead already."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Kills and forgets it."""
        self.kill()
        self._channel.close()


def _end_all(processes: list[_Process]) -> None:
    while processes:
        processes.pop().end()


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


def _why_ended(status: int) -> InvalidRequest:
    """What a process's exit status says about the conversation that it ended over."""
    kind = InvalidRequest
    if status == -signal.SIGPROF:
        what = f"took more than {MAX_SECONDS:g} s of processor time, the limit"
    elif status == NO_MEMORY_STATUS:
        what = f"needed more than {MAX_MEMORY >> 20} MiB of memory, the limit"
    else:
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        what, kind = f"came to no end, its process was ended {how}", _Killed
    return kind(f"the model's chat template {what}: shorten the messages, {_WITHOUT}", "messages")
