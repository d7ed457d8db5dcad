import contextlib
import importlib

from tpworker.ipc.child import RankBoot, run_child
from tpworker.rank.context import open_early

_ON_CUDA = (
    "tpworker.kernels.cuda_operations",
    "tpworker.kernels.symmetric_kernels",
    "tpworker.rank.cuda",
    "tpworker.rank.cuda_collectives",
    "tpworker.rank.compilations",
)
"""What ranks import besides, sooner or later."""


def prepare(device: str) -> None:
    importlib.import_module("tpworker.rank.process")
    if device == "cuda":
        with contextlib.suppress(ImportError):  # the rank will say so itself, where it needs it
            for module in _ON_CUDA:
                importlib.import_module(module)


def main(boot: RankBoot) -> None:
    if boot.settings.device == "cuda":
        open_early(boot.rank)
    from tpworker.rank.process import rank_main

    rank_main(boot)


run_child(RankBoot, main, prepare)
