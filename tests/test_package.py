from __future__ import annotations

import subprocess
import sys

import pytest

import tpworker

HEAVY = {"torch", "transformers", "numpy", "fastapi", "uvicorn", "prometheus_client", "pynvml", "safetensors"}
LIGHT = {"asyncio", "zmq", "msgpack", "logging"}


def test_every_public_name_can_be_imported() -> None:
    for name in tpworker.__all__:
        assert getattr(tpworker, name).__name__ == name
    assert set(tpworker.__all__) <= set(dir(tpworker))
    assert tpworker.__all__ == sorted(tpworker.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Runtimes'"):
        tpworker.Runtimes  # noqa: B018


@pytest.mark.parametrize(
    ("what", "unwanted"),
    [
        ("import tpworker", HEAVY | LIGHT),
        ("from tpworker import *", HEAVY),
        ("import tpworker.scheduler.process", HEAVY),
    ],
)
def test_importing_it_imports_nothing_heavy(what: str, unwanted: set[str]) -> None:
    program = f"import sys\n{what}\nprint(*sorted(set(sys.modules) & {unwanted!r}))"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == ""
