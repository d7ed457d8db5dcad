"""Ray Serve, in an environment of its own: a replica is killed, and no stream is lost."""

from __future__ import annotations

import json
import os
import shutil
import site
import socket
import subprocess
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import folder
from tests.integration.guided import TOKENIZER

__all__ = ["folder"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
RAY = "ray[serve]==2.60.0"
INSTALL_SECONDS = 240
RUN_SECONDS = 200
ROOT = Path(__file__).parents[2]


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an environment with Ray, and with what is installed for these tests."""
    place = tmp_path / "environment"
    venv.create(place, with_pip=False, symlinks=True)
    (here,) = place.glob("lib/python*/site-packages")
    (here / "ours.pth").write_text("\n".join(site.getsitepackages()))
    python = place / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", RAY]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"Ray did not install within {INSTALL_SECONDS} s")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"Ray does not install here: {error.stderr.decode().strip()[-300:]}")
    return python


@pytest.fixture
def cluster() -> Iterator[str]:
    """A folder for a cluster's files, named so shortly that its sockets fit. Nothing is left of either."""
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    yield place
    left = [p for p in psutil.process_iter() if place in " ".join(_command(p))]
    for process in left:
        process.kill()
    psutil.wait_procs(left, 10)
    shutil.rmtree(place)
    assert not left, f"a cluster was left: {left}"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_no_stream_is_lost_with_a_replica(python: Path, cluster: str, folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    TOKENIZER.save(str(model / "tokenizer.json"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(python), "-m", "tests.integrations.on_ray", str(model), str(port), cluster]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-8000:]
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["differ"] == []
    assert seen["reasons"] == ["length", "stop"]
    assert seen["moved"] > 0, "nothing ran where it was killed"
    assert seen["num_others"] == 1
    assert (seen["request_ids"], seen["reset"]) == (["mine"], {"success": True})
    assert {"tpworker-rank0", "tpworker-scheduler", "tpworker-rank-standby"} <= set(seen["names"])
    assert seen["left"] == [], "processes of a replica that was killed"
