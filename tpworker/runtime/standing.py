"""Where the processes of a generation stand: for who finds out whose fault it is, and for who reads of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tpworker.ipc.board import Board, Field, Phase
from tpworker.ipc.child import SCHEDULER_NAME
from tpworker.ipc.patience import Patience
from tpworker.runtime.children import Child
from tpworker.runtime.faults import Fault, Standing

STACKS_SECONDS = 0.5
"""How long a process that hangs may take to write its stacks."""

_STEPS = (Field.RECEIVED, Field.ADMITTED, Field.LAUNCHED, Field.COMPLETED)


def standing_of(child: Child, board: Board) -> Standing:
    """Of a process that lives."""
    return Standing(child.stopped, progress_of(child, board))


def progress_of(child: Child, board: Board) -> tuple[int, ...]:
    """See `Standing`."""
    row = board.row(child.name)
    progress = (row[Field.PHASE], *(row[field] for field in _STEPS))
    return () if child.name == SCHEDULER_NAME else progress


def explain(fault: Fault, children: Sequence[Child], board: Board, collect: Callable[[float], None]) -> Fault:
    """Of a process that hangs: its stacks, where everybody stands, and whether somebody has stopped it.

    Args:
        children: all of the generation.
        collect: sleeps until one of them says something, at most so many seconds, and has it read.
    """
    at_fault = [child for child in children if child.name in fault.process.split(", ")]
    is_external = fault.is_external or any(child.stopped for child in at_fault)
    parts = [fault.traceback] if fault.traceback else []
    positions = "\n".join(_position(child, board) for child in children)
    parts.append(f"Where each process stands (steps so far):\n{positions}")
    for child in at_fault:
        if stacks := _stacks_of(child, collect):
            parts.append(f"Stacks of {child.name}:\n{stacks}")
    return replace(fault, traceback="\n".join(parts), is_external=is_external)


def _position(child: Child, board: Board) -> str:
    row = board.row(child.name)
    steps = ", ".join(f"{field.name.lower()} {row[field]}" for field in _STEPS)
    phase = Phase(row[Field.PHASE]).name.lower()
    return f"  {child.name} (pid {child.pid}, {child.state}, {phase}): {steps}"


def _stacks_of(child: Child, collect: Callable[[float], None]) -> str:
    if child.over or child.stopped:
        return ""
    child.ask_for_stacks()
    patience = Patience(STACKS_SECONDS)
    while patience.left() and not child.over:
        seen = len(child.stacks)
        collect(0.1)
        if seen and len(child.stacks) == seen:
            break  # quiet for a while: that was all
    return child.stacks
