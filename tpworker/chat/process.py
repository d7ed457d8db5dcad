"""The process that renders chat templates: a template is a program, and gets no more than its share.

Memory is bounded by RLIMIT_AS, the time of one rendering by a timer of CPU time, which ends the process
whatever it is in, and the text's length by counting while it grows. The parent holds the other end of a
socket: when that is closed, this process ends.

    {template, special_tokens, limits}    ──►   [READY, content kind] or [BROKEN, why]
    {messages, context, variables}, …     ──►   [TEXT, it], [REFUSED, the template's words], [FAILED, why]
                                                or [TOO_LONG, '']
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import threading
from pathlib import Path
from typing import Any, NoReturn

import setproctitle
from jinja2 import Template, TemplateError, TemplateSyntaxError

from tpworker.chat.content import ContentKind, as_wanted, content_kind
from tpworker.chat.environment import Refused, chat_environment, message_for_template
from tpworker.chat.frames import (
    BROKEN,
    FAILED,
    NO_MEMORY_STATUS,
    READY,
    REFUSED,
    TEXT,
    TOO_LONG,
    pack,
    receive,
)

NAME = "tpworker-template"


def main() -> NoReturn:
    """Serves the parent until it is gone."""
    setproctitle.setproctitle(NAME)
    # When to stop is for the parent to say. Who made it may have blocked or ignored the timer's signal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    parent = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    threading.Thread(target=_end_with, args=(parent.fileno(),), daemon=True).start()
    try:
        _serve(parent)
    except MemoryError:
        os._exit(NO_MEMORY_STATUS)
    except OSError:  # nobody is there to be told
        pass
    os._exit(0)


def _end_with(parent: int) -> None:
    """Ends the process as soon as the other end is closed, whatever it is doing."""
    poll = select.poll()
    poll.register(parent, select.POLLRDHUP)
    poll.poll()
    os._exit(0)


def _serve(parent: socket.socket) -> None:
    start = receive(parent.recv)
    if start is None:
        return
    _bound_memory(start["max_memory"])
    max_seconds, max_chars = start["max_seconds"], start["max_chars"]
    signal.setitimer(signal.ITIMER_PROF, max_seconds)
    compiled = _compile(start["template"])
    signal.setitimer(signal.ITIMER_PROF, 0)
    if isinstance(compiled, str):
        parent.sendall(pack([BROKEN, compiled]))
        return
    template, kind = compiled
    parent.sendall(pack([READY, kind]))
    while (request := receive(parent.recv)) is not None:
        signal.setitimer(signal.ITIMER_PROF, max_seconds)
        frame = pack(_render(template, _variables(request, kind, start["special_tokens"]), max_chars))
        signal.setitimer(signal.ITIMER_PROF, 0)
        parent.sendall(frame)


def _bound_memory(max_memory: int) -> None:
    """At most so many bytes beyond what the process has mapped by now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + max_memory
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _compile(source: str) -> tuple[Template, ContentKind] | str:
    """The template and what it wants of content; or what is wrong with it."""
    environment = chat_environment()
    try:
        return environment.from_string(source), content_kind(environment.parse(source))
    except MemoryError:
        raise
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {(error.message or '').rstrip('.')}"
    except Exception as error:  # nested too deeply for Python's compiler, say
        return _name(error)


def _variables(request: Any, kind: ContentKind, special_tokens: dict[str, str]) -> dict[str, Any]:
    messages = [message_for_template(message) for message in request["messages"]]
    for message in messages:
        if "content" in message:
            message["content"] = as_wanted(message["content"], kind)
    return {**special_tokens, **request["variables"], **request["context"], "messages": messages}


def _render(template: Template, variables: dict[str, Any], max_chars: int) -> list[str]:
    parts: list[str] = []
    num_chars = 0
    try:
        for part in template.generate(variables):
            num_chars += len(part)
            if num_chars > max_chars:
                return [TOO_LONG, ""]
            parts.append(part)
        return [TEXT, "".join(parts)]
    except MemoryError:
        raise
    except Refused as error:
        return [REFUSED, str(error)]
    except TemplateError as error:
        return [FAILED, str(error) or _name(error)]
    except Exception as error:
        return [FAILED, _name(error)]


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
