"""What a start shows, on a terminal and elsewhere."""

from __future__ import annotations

import io
import sys
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from tpworker import cli
from tpworker.cli import terminal
from tpworker.cli.terminal import StartProgress
from tpworker.config import RuntimeConfig
from tpworker.observe.start import Stage, StartTimes
from tpworker.runtime.settings import Speculation


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_it_is_a_line_when_something_changes(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(StartProgress()) as progress:
        for fraction in (None, None):
            progress("starting", fraction)
        for percent in range(100):
            progress("loading", percent / 100)
    assert capsys.readouterr().err == "tpworker: starting\ntpworker: loading\n"


def test_elsewhere_it_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_PLAIN_PERIOD_S", 0.0)
    with closing(StartProgress()) as progress:
        progress("loading", 0.0)
        progress("loading", 0.5)
    assert capsys.readouterr().err == "tpworker: loading\ntpworker: loading 50%\n"


def test_on_a_terminal_it_is_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with closing(StartProgress()) as progress:
        progress("starting", None)
        progress("loading", 0.25)
        progress.close()
        shown = screen.getvalue()
        assert "starting" in shown
        assert "loading" in shown
        assert "\x1b[" in shown
    assert "rich" in sys.modules
    assert screen.getvalue() == shown, "closing twice does nothing"


def test_nothing_is_shown_that_nobody_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(StartProgress()):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("box", "box")],
)
def test_the_address_to_try(host: str, address: str) -> None:
    assert terminal._reachable(host) == address


def test_what_is_ready_is_told_with_where_the_time_went() -> None:
    times = StartTimes((Stage("model found", 0.25), Stage("weights loaded", 2.0, "4.0 GB, 2.0 GB/s")))
    runtime: Any = SimpleNamespace(
        config=RuntimeConfig(tensor_parallel_size=2),
        start_times=times,
        served_name="model",
        speculation=Speculation.of(RuntimeConfig()),
        device="cpu",
        quantization="",
        dtype="float32",
        has_tokenizer=True,
        tokenizer=SimpleNamespace(has_chat_template=True),
    )
    options: Any = cli.parse(["serve", "--host", "0.0.0.0", "-tp", "2"])
    text = terminal.ready_text(runtime, options, 81)
    assert text.startswith(
        "\ntpworker is ready: model on 2 TP ranks on the CPU, float32, http://127.0.0.1:81\n"
    )
    assert (
        "\n  weights loaded    2.00    2.25  (4.0 GB, 2.0 GB/s)\n\n  curl http://127.0.0.1:81/v1/chat" in text
    )
    runtime.start_times = None
    assert "Start" not in terminal.ready_text(runtime, options, 81)
    runtime.has_tokenizer, runtime.device, runtime.dtype = False, "cuda", "bfloat16"
    text = terminal.ready_text(runtime, options, 81)
    assert "It has no tokenizer: prompts are token ids" in text
    assert "/v1/completions" in text
    assert '{"prompt": [1, 2, 3], "max_tokens": 8}' in text
    assert "model on 2 TP ranks on GPUs, bfloat16, http" in text
    runtime.speculation = Speculation.of(RuntimeConfig(speculative_method="mtp"))
    text = terminal.ready_text(runtime, options, 81)
    assert "on GPUs, bfloat16, 1 draft a step by the model's own head, http" in text
