"""What outlives generations: descriptors, and the keeper's process (which needs no GPU to live and die)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.conftest import eventually, is_gone
from tests.runtime.test_supervisor import Watched
from tpworker.runtime.keeping import Keeping

pytestmark = pytest.mark.usefixtures("nothing_left")


def identity(keeping: Keeping) -> tuple[int, ...]:
    """Which memory it is."""
    return tuple(os.fstat(fd).st_ino for fd in (keeping.fd(0), keeping.fd(1), keeping.blocks_fd))


def test_on_the_cpu_there_is_no_keeper() -> None:
    keeping = Keeping(2)
    assert keeping.start() == ()
    assert (keeping.keeper_address, keeping.keeper_pid) == ("", None)
    keeping.close()


def test_the_keeper_is_started_once_and_ends_with_the_rest() -> None:
    keeping = Keeping(2, "cuda")
    assert keeping.keeper_pid is None
    before = identity(keeping)
    (keeper,) = keeping.start()
    address = keeping.keeper_address
    assert keeping.start() == (keeper,)
    eventually(lambda: psutil.Process(keeping.keeper_pid).name() == "tpworker-keeper")
    assert (identity(keeping), keeping.keeper_address) == (before, address)
    keeping.close()
    assert is_gone(keeper.process.pid)
    keeping.close()


def test_the_keeper_sees_the_gpus_of_ranks_that_have_joined_and_forgets_all_of_others() -> None:
    keeping = Keeping(2, "cuda")
    (first,) = keeping.start(("GPU-b", "GPU-a"))
    assert keeping.start(("GPU-b", "GPU-a")) == (first,)
    assert psutil.Process(first.process.pid).environ()["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"
    before = identity(keeping)
    (second,) = keeping.start(("GPU-b", "GPU-c"))
    assert second is not first
    assert not set(identity(keeping)) & set(before)
    keeping.close()


@pytest.mark.parametrize("how", ["killed", "forgotten"])
def test_of_a_keeper_that_is_gone_all_is_forgotten(how: str) -> None:
    keeping = Keeping(2, "cuda")
    (first,) = keeping.start()
    before, address = identity(keeping), keeping.keeper_address
    if how == "killed":
        first.process.kill()
        first.process.wait()
    else:
        keeping.forget()
    (second,) = keeping.start()
    assert is_gone(first.process.pid)
    assert second.process.pid == keeping.keeper_pid != first.process.pid
    assert keeping.keeper_address != address
    assert not set(identity(keeping)) & set(before)
    keeping.close()


def test_the_death_of_the_keeper_is_a_fault_that_forfeits_what_it_had(
    model_folder: Path,
) -> None:
    keeping = Keeping(2, "cuda")
    watched = Watched(model_folder, keeping=keeping)
    watched.ready()
    assert keeping.keeper_pid is not None
    os.kill(keeping.keeper_pid, signal.SIGKILL)
    fault = watched.fault()
    assert fault.process == "tpworker-keeper"
    assert fault.summary.startswith("tpworker-keeper was killed by SIGKILL")
    assert fault.forfeits
    assert fault.is_external
    watched.close()
    keeping.close()
