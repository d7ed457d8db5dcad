"""What a start shows, on a terminal and elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from tpworker import terminal
from tpworker.terminal import StartProgress


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_it_is_a_line_when_something_changes(capsys: pytest.CaptureFixture[str]) -> None:
    with StartProgress() as progress:
        for fraction in (None, None):
            progress("starting", fraction)
        for percent in range(100):
            progress("loading", percent / 100)
    assert capsys.readouterr().err == "tpworker: starting\ntpworker: loading\n"


def test_elsewhere_it_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_PLAIN_PERIOD_S", 0.0)
    with StartProgress() as progress:
        progress("loading", 0.0)
        progress("loading", 0.5)
    assert capsys.readouterr().err == "tpworker: loading\ntpworker: loading 50%\n"


def test_on_a_terminal_it_is_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with StartProgress() as progress:
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
    with StartProgress():
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("box", "box")],
)
def test_the_address_to_try(host: str, address: str) -> None:
    assert terminal._reachable(host) == address
