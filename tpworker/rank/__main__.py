from tpworker.ipc.board import Board, Phase
from tpworker.ipc.child import RankBoot, board_names, run_child


def main(boot: RankBoot) -> None:
    board = Board.attach(boot.board_fd, board_names(boot.num_ranks))
    board.row(boot.name).enter(Phase.IMPORTING)
    from tpworker.rank.process import rank_main  # seconds, once this process has a name

    rank_main(boot)


run_child(RankBoot, main)
