"""What is said of a command line that holds what there is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tpworker.cli.habit_values import VALUES
from tpworker.cli.habits import COMMANDS, FACTS, FAMILIES, NAMES
from tpworker.errors import shown

Flags = Mapping[str, bool]
"""The options of a command, and whether they take a value."""


def explain(unknown: Sequence[str], arguments: Sequence[str], flags: Mapping[str, Flags]) -> str:
    """One line on all that argparse has left over.

    Args:
        unknown: what it has left over: options, their values, and words that belong to no option.
        arguments: the whole command line, the command first.
        flags: of each command.
    """
    command = arguments[0]
    said: dict[str, None] = {}  # in order, each once
    for word in unknown:
        if word.startswith("-"):
            said[_option(word, command, flags)] = None
        elif (owner := _owner(word, arguments, flags[command])) in flags[command] or not owner:
            said[_stray(word, owner, flags[command])] = None
    return "; ".join(said)


def _option(word: str, command: str, flags: Mapping[str, Flags]) -> str:
    written = word.partition("=")[0]
    flag = written.partition(".")[0].replace("_", "-")  # vLLM takes --a_b for --a-b, and --a.b
    others = [other for other in flags if flag in flags[other]]
    if command in others:
        return f"{written}: the name here is {flag}"
    if others:
        return f"{flag}: an option of `tpworker {others[0]}` alone: leave it out"
    if flag in NAMES:
        return f"{written}: the name here is {NAMES[flag]}"
    if said := _fact(flag) or _fact(flag.replace("--no-", "--", 1)):
        return f"{written}: {said}"
    import difflib

    near = difflib.get_close_matches(flag, list(flags[command]), n=1, cutoff=0.75)
    return f"{shown(written)}: no such option; " + (
        f"is {near[0]} meant?" if near else f"`tpworker {command} --help` lists all"
    )


def _fact(flag: str) -> str | None:
    """What is so of an option, or of all of its family."""
    if flag in FACTS:
        return FACTS[flag]
    return next((said for said, beginnings in FAMILIES.items() if flag.startswith(tuple(beginnings))), None)


def _owner(word: str, arguments: Sequence[str], flags: Flags) -> str:
    """The option that a stray word stands behind; '' if it stands behind none."""
    for at, argument in enumerate(arguments):
        before = arguments[at - 1]
        if argument == word and not (flags.get(before) and at):  # or it would be that option's value
            behind = (one for one in reversed(arguments[1:at]) if one.startswith("-"))
            return next(behind, "").partition("=")[0]
    return ""


def _stray(word: str, owner: str, flags: Flags) -> str:
    model = "a model is named first, or with --model"
    if flags.get(owner):
        return f"{shown(word)}: {owner} takes one value, and one with spaces needs quotes; {model}"
    return f"{shown(word)}: belongs to no option; {model}"


def misnamed(flag: str, value: object, choices: Sequence[str]) -> str | None:
    """What to say of a value that an option does not have; None: nothing but that.

    Args:
        flag: the option; '' for the command itself.
        value: what was given.
        choices: what there is.
    """
    if not flag:
        told = COMMANDS.get(str(value), "")
        return f"{shown(value)} is no command ({', '.join(choices)}); a model: `tpworker serve MODEL`{told}"
    said = VALUES.get(flag, {}).get(str(value))
    return None if said is None else f"{shown(value)}: {said}"
