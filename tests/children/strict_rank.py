"""A rank in which, from its first plan on, waiting for the GPU is an error: torch's sync debug mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tpworker.ipc.child import RankBoot, run_child


def main(boot: RankBoot) -> None:
    import torch

    from tpworker.rank import process

    uninterrupted = process.uninterrupted

    @contextlib.contextmanager
    def strict() -> Iterator[None]:
        with uninterrupted():
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    process.uninterrupted = strict
    process.rank_main(boot)


if __name__ == "__main__":
    run_child(RankBoot, main)
