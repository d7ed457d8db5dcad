from tpworker.ipc.child import RankBoot, run_child


def main(boot: RankBoot) -> None:
    from tpworker.rank.process import rank_main  # seconds of imports, once it has a name

    rank_main(boot)


run_child(RankBoot, main)
