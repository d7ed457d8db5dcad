"""How families of models think before they answer."""

from __future__ import annotations

from dataclasses import dataclass

from tpworker.structured_outputs import Thinking


@dataclass(frozen=True)
class ReasoningFormat:
    """Which marks are around what a model thinks.

    Args:
        name: as `--reasoning-parser` has it.
        start, end: the marks.
    """

    name: str
    start: str
    end: str

    def thinking(self, prompt: str) -> Thinking | None:
        """What the output begins with; None: this prompt leaves no thinking to come.

        Args:
            prompt: the text of the conversation, as the chat template has rendered it.
        """
        before, _, behind = prompt.rpartition(self.end)
        if before and not behind.strip():
            return None
        _, mark, behind = prompt.rpartition(self.start)
        is_open = bool(mark) and not behind.strip()
        return Thinking(start=self.start, end=self.end, is_open=is_open)
