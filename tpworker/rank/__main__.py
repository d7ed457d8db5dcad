import gc

from tpworker.ipc.board import Board, Phase
from tpworker.ipc.child import RankBoot, board_names, run_child
from tpworker.rank.context import open_early


def main(boot: RankBoot) -> None:
    board = Board.attach(boot.board_fd, board_names(boot.num_ranks))
    board.row(boot.name).enter(Phase.IMPORTING)
    if boot.settings.device == "cuda":
        open_early(boot.rank)
    gc.disable()  # or it looks through what torch is made of, time and again: a fifth of the import
    from tpworker.rank.process import rank_main  # seconds, once this process has a name

    gc.freeze()
    gc.enable()
    rank_main(boot)


run_child(RankBoot, main)
