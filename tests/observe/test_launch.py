"""What launchers say to the processes that they start."""

from __future__ import annotations

import pytest

from tpworker.errors import ConfigError
from tpworker.observe.launch import Launch, find_launch

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "2", "SLURM_NTASKS": "8", "SLURM_LOCALID": "2"}


def test_torchrun_counts_more_than_slurm_and_what_is_given_more_than_both() -> None:
    assert find_launch({}) == Launch()
    assert find_launch({}, 2) == Launch(2, None, None, "--rank 2")
    assert find_launch(SLURM) == Launch(2, 8, 2, "SLURM_PROCID=2")
    assert find_launch(SLURM | TORCHRUN) == Launch(3, 4, 1, "RANK=3")
    assert find_launch(TORCHRUN, 0) == Launch(0, None, 1, "--rank 0")
    assert find_launch({"RANK": "0"}) == Launch(0, None, None, "RANK=0")


@pytest.mark.parametrize("value", ["", "-1", "one", "1.0", "٣", "99999999"])
def test_what_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"the environment says LOCAL_RANK=.* correct it, or unset it"):
        find_launch(TORCHRUN | {"LOCAL_RANK": value})
