import os

from tpworker.ipc.child import RankBoot, run_child
from tpworker.rank.context import open_early
from tpworker.rank.imports import import_all


def main(boot: RankBoot) -> None:
    if boot.gpus:  # one of another launcher's, which may show each process its own GPU alone
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(boot.gpus)
    if boot.settings.device == "cuda":
        open_early(boot.rank)
    from tpworker.rank.process import rank_main  # which the standby has imported, once it had a name

    rank_main(boot)


run_child(RankBoot, main, import_all)
