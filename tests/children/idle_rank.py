"""A rank that meets the scheduler and then waits for Stop; or does what a file in the model folder says.

`MODEL/tpworker-rank1` holds a Python expression over the names of this module, evaluated when rank 1 is
ready: `MODEL/tpworker-rank1.early`, before it has said a word.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import NoReturn

from tpworker.errors import ModelError
from tpworker.ipc.barrier import Barrier, BarrierTimeout
from tpworker.ipc.board import Board, Field, Phase
from tpworker.ipc.channels import Channel
from tpworker.ipc.child import RankBoot, board_names, run_child
from tpworker.ipc.messages import Allocate, RankLoaded, RankReady, Stop
from tpworker.ipc.wire import expect

NUM_BLOCKS = 129


def fail(error: BaseException) -> NoReturn:
    raise error


def main(boot: RankBoot) -> None:
    row = Board.attach(boot.board_fd, board_names(boot.num_ranks)).row(boot.name)
    names = {
        "os": os, "signal": signal, "time": time, "fail": fail, "boot": boot, "row": row, "Field": Field,
        "ModelError": ModelError, "BarrierTimeout": BarrierTimeout,
        "barrier": Barrier.attach(boot.barrier_fd, boot.num_ranks),
    }  # fmt: skip

    def obey(file: Path) -> None:
        if file.exists():
            eval(file.read_text(), names)

    script = Path(boot.model) / boot.name
    row[Field.PHASE] = Phase.LOADING
    obey(script.with_suffix(".early"))
    plans = Channel.connect(boot.plan_address, boot.name, boot.generation)
    plans.send(RankLoaded(boot.generation, boot.rank, boot.settings.num_kv_blocks or NUM_BLOCKS))
    expect(plans.receive(30.0) or fail(TimeoutError()), Allocate)
    row[Field.PHASE] = Phase.READY
    plans.send(RankReady(boot.generation, boot.rank))
    names["plans"] = plans
    obey(script)
    expect(plans.receive(None) or fail(TimeoutError()), Stop)


run_child(RankBoot, main)
