"""The command line of `tpworker rank`."""

from __future__ import annotations

import pytest

from tpworker import cli
from tpworker.cli.rank import hello_of
from tpworker.cli.rank_options import RankOptions
from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError
from tpworker.ipc.joining import ANY


def test_what_is_said() -> None:
    assert cli.parse(["rank", "--join", "a-b_c.1"]) == RankOptions("a-b_c.1", None, 600.0)
    words = ["rank", "--join", "a", "--rank", "3", "--timeout", "1.5"]
    assert cli.parse(words) == RankOptions("a", 3, 1.5)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--join", "a/b"], "--join 'a/b': must be 1 to 64 of letters, digits"),
        (["--join", "a" * 65], "must be 1 to 64 of letters, digits"),
        (["--join", "a", "--rank", "64"], "--rank 64: must be from 0 to 63"),
        (["--join", "a", "--timeout", "0"], "--timeout 0.0: must be above 0 and at most 86400 seconds"),
    ],
)
def test_what_is_out_of_range_is_refused(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.parse(["rank", *words])
    assert told in str(caught.value)


def test_an_address_of_a_runtime_is_checked_alike() -> None:
    assert RuntimeConfig(join_address="a-b_c.1").join_address == "a-b_c.1"
    for name in ("", "a/b", "a" * 65, "ä"):
        with pytest.raises(ConfigError, match="1 to 64 of letters"):
            RuntimeConfig(join_address=name)


def test_the_launcher_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    options = RankOptions("a", None, 1.0)
    assert (hello_of(options).rank, hello_of(options).num_ranks, hello_of(options).gpu) == (ANY, 0, ANY)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    hello = hello_of(options)
    assert (hello.rank, hello.num_ranks, hello.gpu, hello.told_by) == (1, 2, 1, "RANK=1")
