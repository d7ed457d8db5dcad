"""A real rank whose device fails whenever it is given a prompt that begins with a certain token."""

from __future__ import annotations

from tpworker.ipc.child import RankBoot, run_child

POISON = 66


def main(boot: RankBoot) -> None:
    from tpworker.ipc.arrays import unpack_int32
    from tpworker.ipc.messages import BatchPlan
    from tpworker.rank import runner
    from tpworker.rank.process import rank_main

    launch = runner.Runner.launch

    def poisonable(self: runner.Runner, plan: BatchPlan) -> runner.Launched:
        if any(unpack_int32(admission.tokens)[0] == POISON for admission in plan.admitted):
            raise ValueError("no sample of this can be taken")
        return launch(self, plan)

    runner.Runner.launch = poisonable  # type: ignore[method-assign]
    rank_main(boot)


if __name__ == "__main__":
    run_child(RankBoot, main)
