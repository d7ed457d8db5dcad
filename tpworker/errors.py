"""Every exception that tpworker raises on purpose.

    TpworkerError
    ├── ConfigError        an option, or a combination of options, that cannot work   (also a ValueError)
    ├── ModelError         a model folder that is missing, broken or not supported    (also a ValueError)
    ├── RequestError       one request that is refused; nothing else is affected
    │   ├── InvalidRequest     a parameter out of range, or not supported             (also a ValueError)
    │   ├── PromptTooLong      the prompt, or prompt + max_tokens, does not fit
    │   ├── QueueFull          backpressure: try again later
    │   └── RequestFailed      it was taken, and cannot go on, for a reason of its own
    ├── RuntimeStopped     the runtime is not started, drains, or has stopped
    │   └── RuntimeSleeping    it sleeps: wake it up first
    └── RuntimeFailed      processes died, hung, diverged or raised too often; names the last

Messages say what was wrong, the limit, and the remedy.
"""

from __future__ import annotations

import reprlib

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 80
_shown.maxlong = 40
_shown.maxlevel = 3
_LONGEST = 120


class TpworkerError(Exception):
    """Base class of all errors raised by tpworker."""


class ConfigError(TpworkerError, ValueError):
    """An option, or a combination of options, cannot work on this machine or with this model."""


class ModelError(TpworkerError, ValueError):
    """A model cannot be found, read, or is of a kind that is not supported."""


class RequestError(TpworkerError):
    """One request is refused or ended; the runtime and all other requests go on."""


class InvalidRequest(RequestError, ValueError):
    """A parameter of a request is out of range or names something that is not supported.

    Args:
        message: what was wrong, the limit and the remedy.
        parameter: the name of the offending parameter, as the user wrote it, if there is one.
    """

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class PromptTooLong(InvalidRequest):
    """The prompt, or the prompt with the tokens asked for, is longer than the runtime can hold."""


class QueueFull(RequestError):
    """As many requests wait as `max_queue` allows. Try again later, or raise --max-queue."""


class RequestFailed(RequestError):
    """A request that was taken cannot go on, for a reason of its own: say a grammar beyond its bounds."""


class RuntimeStopped(TpworkerError):
    """The runtime was not started, is draining, or has stopped."""


class RuntimeSleeping(RuntimeStopped):
    """The runtime sleeps (`Runtime.sleep`), and takes no requests before it is woken up."""


class RuntimeFailed(TpworkerError):
    """The runtime ended: its processes died, hung, diverged or raised more often than they may be restarted.

    Args:
        message: what happened, in one line.
        process: the name of the process at fault, e.g. `tpworker-rank1`.
        traceback: its traceback, if it could still write one.
    """

    def __init__(self, message: str, process: str | None = None, traceback: str | None = None) -> None:
        super().__init__(message if traceback is None else f"{message}\n{traceback}")
        self.summary = message
        self.process = process
        self.traceback = traceback


def shown(value: object) -> str:
    """A value in a message: on one line, and not at any length or depth."""
    try:
        text = _shown.repr(value)
    except ValueError:  # Python refuses to write an integer of more than some thousand digits
        text = "a number of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 20]}...{text[-17:]}"


def printable(text: str) -> str:
    """What can be shown on one line of a terminal, whatever it holds: what others say may be anything."""
    return "".join(char if char.isprintable() else "?" for char in text)


def one_line(text: str, longest: int) -> str:
    """What another library says, on one line and shortened to so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[:longest]}…"
