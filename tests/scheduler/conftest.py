from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.scheduler.helpers import worlds


@pytest.fixture(autouse=True)
def worlds_end_with_their_test() -> Iterator[None]:
    """Though a traceback or a circle keeps one: the boards that a process has are looked for elsewhere."""
    yield
    while worlds:
        worlds.pop().board.close()
