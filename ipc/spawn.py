"""What a process that we start is given: its environment, and where its output goes."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
from pathlib import Path


def child_environment(device: str) -> dict[str, str]:
    """The environment of the children: ours, with what they need to be found and not to disturb each other.

    The caller's own modules cannot get in the way: `-P` keeps the working folder out of `sys.path`, and the
    folder that holds tpworker comes first in it.
    """
    environment = dict(os.environ)
    home = str(Path(__file__).absolute().parents[2])  # not resolved: tpworker/ipc may be a link
    if home not in _site_folders():  # in front, those would hide parts of the standard library
        paths = environment.get("PYTHONPATH", "").split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join([home, *(path for path in paths if path)])
    # numpy's, which nobody uses, or importing it would start threads: standbys are forked, and have one.
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    if device == "cpu":
        environment.setdefault("OMP_NUM_THREADS", "1")  # as many ranks as cores, or more: they would fight
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks are on one host
    else:
        environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # so that we know which GPU a rank gets
    return environment


def _site_folders() -> list[str]:
    return [*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib")]


def log_descriptor() -> int:
    """Our stderr. Where there was none when we began, 2 is whatever was opened next: nothing to write to."""
    try:
        os.fstat(2)
    except OSError:  # closed since
        return subprocess.DEVNULL
    return 2 if sys.__stderr__ is not None else subprocess.DEVNULL
