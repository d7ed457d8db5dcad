from tpworker.ipc.child import RankBoot, run_child
from tpworker.rank.context import open_early, show_gpus
from tpworker.rank.imports import import_all


def main(boot: RankBoot) -> None:
    show_gpus(boot.gpus)
    if boot.settings.device == "cuda":
        open_early(boot.rank)
    from tpworker.rank.process import rank_main  # which the standby has imported, once it had a name

    rank_main(boot)


run_child(RankBoot, main, import_all)
