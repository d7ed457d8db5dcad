"""Names of special tokens are taken out of a text, wherever it is cut."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpworker.server.hidden import HiddenNames, Hiding, hidden_names

NAMES = frozenset({"<pad>", "<pad>x", "<a", "[B]", "||"})


def hide(names: HiddenNames, pieces: list[str]) -> str:
    hiding = Hiding(names)
    return "".join([hiding.feed(piece) for piece in pieces]) + hiding.finish()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("", ""),
        ("a<b", "a<b"),
        ("<pad>a<pad>", "a"),
        ("a<pad>xb", "ab"),
        ("<", "<"),
        ("a [B", "a [B"),
        ("<<pad>", "<"),
        ("|||", "|"),
    ],
)
def test_all_at_once(text: str, left: str) -> None:
    assert hide(HiddenNames(NAMES), [text]) == left


@settings(deadline=None)
@given(st.lists(st.text("<pad>x[B]|", max_size=6), max_size=8))
@example(["[<pad>", "B]"])
@example(["<", "<pa", "d>"])
def test_nothing_of_them_is_told_and_nothing_else_is_lost(pieces: list[str]) -> None:
    names = HiddenNames(frozenset({"<pad>", "[B]"}))
    assert hide(names, pieces) == re.sub(r"<pad>|\[B\]", "", "".join(pieces))


@settings(deadline=None)
@given(st.text("<pad>x[B]|", max_size=20))
def test_no_more_is_held_back_than_may_be_a_name(text: str) -> None:
    names = HiddenNames(NAMES)
    told = Hiding(names).feed(text)
    assert len(text) - len(told) <= names.longest or any(name in text for name in NAMES)


def test_no_names_hold_nothing_back() -> None:
    hiding = Hiding(hidden_names(frozenset()))
    assert hiding.feed("<pad") == "<pad"
    assert hiding.finish() == ""
