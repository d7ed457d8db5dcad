"""The kinds of what process.py answers renderer.py."""

from __future__ import annotations

from typing import Final

TEXT: Final = "text"
REFUSED: Final = "refused"
FAILED: Final = "failed"
TOO_LONG: Final = "too long"
