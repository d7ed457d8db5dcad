"""What a start shows on stderr: how far it is, and what to do when it is ready."""

from __future__ import annotations

import shlex
import sys
import time
from typing import TYPE_CHECKING

from tpworker.cli.log_options import say
from tpworker.logs import TEXT, format_in_use

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from tpworker.cli.options import Options
    from tpworker.runtime.runtime import Runtime

_PLAIN_PERIOD_S = 5.0


class StartProgress:
    """Shows progress on stderr: a bar on a terminal, else a line now and then. Call it; then close it.

    Calls come as often as anything changes, with what is going on and how much of it is done.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._text = ""
        self._said_at = 0.0
        self._is_terminal = sys.stderr.isatty() and format_in_use() == TEXT

    def __call__(self, text: str, fraction: float | None) -> None:
        if self._is_terminal:
            self._draw(text, fraction)
        else:
            self._say(text, fraction)

    def close(self) -> None:
        """Wipe the bar: other output follows."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, text: str, fraction: float | None) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(text, total=None)
        assert self._task is not None
        if text != self._text:
            self._text = text
            self._bar.reset(self._task, description=text)
        self._bar.update(self._task, total=None if fraction is None else 1.0, completed=fraction or 0.0)

    def _say(self, text: str, fraction: float | None) -> None:
        now = time.monotonic()
        if text == self._text and (fraction is None or now < self._said_at + _PLAIN_PERIOD_S):
            return
        self._text, self._said_at = text, now
        done = f" {fraction:.0%}" if fraction else ""
        say(f"{text}{done}")


def ready_line(runtime: Runtime, options: Options, port: int) -> str:
    """What is served, and where."""
    num_ranks = runtime.config.tensor_parallel_size
    ranks = "1 TP rank" if num_ranks == 1 else f"{num_ranks} TP ranks"
    place = "the CPU" if runtime.device == "cpu" else "a GPU" if num_ranks == 1 else "GPUs"
    name = options.served_model_names[0] if options.served_model_names else runtime.served_name
    drafts = f", {runtime.speculation}" if runtime.speculation.method else ""
    weights = ", weights in FP8" if runtime.quantization else ""
    return f"ready: {name} on {ranks} on {place}, {runtime.dtype}{weights}{drafts}, {_url(options, port)}"


def ready_text(runtime: Runtime, options: Options, port: int) -> str:
    """The same, where the start's time went, and a command to try it with."""
    path, body = _example(runtime)
    key = " -H 'Authorization: Bearer '\"$API_KEY\"" if options.api_key is not None else ""
    times = runtime.start_times
    start = "" if times is None else f"Start, in seconds:\n\n{times.table()}\n\n"
    ids_only = (
        "" if runtime.has_tokenizer else "It has no tokenizer: prompts are token ids, texts are empty.\n\n"
    )
    return (
        f"\ntpworker is {ready_line(runtime, options, port)}\n\n"
        f"{start}{ids_only}"
        f"  curl {_url(options, port)}{path} -H 'Content-Type: application/json'{key} \\\n"
        f"    -d {shlex.quote(body)}\n\n"
        "Ctrl-C ends it."
    )


def _url(options: Options, port: int) -> str:
    scheme = "http" if options.tls_files is None else "https"
    return f"{scheme}://{_reachable(options.host)}:{port}"


def _example(runtime: Runtime) -> tuple[str, str]:
    if not runtime.has_tokenizer:
        return "/v1/completions", '{"prompt": [1, 2, 3], "max_tokens": 8}'
    if runtime.tokenizer.has_chat_template:
        return (
            "/v1/chat/completions",
            '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}',
        )
    return "/v1/completions", '{"prompt": "The capital of France is"}'


def _reachable(host: str) -> str:
    """An address for this machine's own clients."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1" if host != "::" else "[::1]"
    return f"[{host}]" if ":" in host else host
