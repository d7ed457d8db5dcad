"""What scripts/ say where nothing is installed, and what an old Python is told."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("bash", "cat", "dirname", "flock", "readlink", "rm", "sed", "sha256sum")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """This checkout as it is on a fresh machine: without .venv."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", root / "scripts")  # no links: a script finds its root by its real path
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "tpworker", "benchmarks"):
        (root / name).symlink_to(ROOT / name)
    return root


def run(
    checkout: Path, script: str, *arguments: str, python: str = f'exec {sys.executable} "$@"'
) -> subprocess.CompletedProcess[str]:
    """Runs a script where `python3`, the only Python on the PATH, is a shell script that does `python`."""
    tools = checkout.parent / "bin"
    if not tools.exists():
        tools.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None, tool
            (tools / tool).symlink_to(found)
    fake = tools / "python3"
    fake.write_text(f"#!{tools}/bash\n{python}\n")
    fake.chmod(0o755)
    command = [str(checkout / "scripts" / script), *arguments]
    environment = {"PATH": str(tools), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [f"{tools}/bash", *command], capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("setup --help", ["Makes .venv", "scripts/setup --dev", "--system-site-packages"]),
        ("setup -h", ["Makes .venv"]),
        ("serve --help", ["usage: tpworker serve", "--max-num-seqs N", "MODEL"]),
        ("serve some/model -tp 4 -h", ["usage: tpworker serve"]),
        ("test --help", ["Runs the tests", "scripts/test tests/scheduler"]),
        ("check --help", ["Lints"]),
        ("bench --help", ["usage: scripts/bench", "barrier"]),
    ],
)
def test_help_needs_nothing_installed(checkout: Path, command: str, words: list[str]) -> None:
    done = run(checkout, *command.split())
    assert (done.returncode, done.stderr) == (0, "")
    for word in words:
        assert word in done.stdout
    assert "set -euo" not in done.stdout
    assert not (checkout / ".venv").exists()


def test_what_is_no_argument_is_refused_before_anything_is_installed(checkout: Path) -> None:
    for script, words in (
        ("setup", "setup: unknown option x; there are --dev"),
        ("check", "takes no arguments"),
    ):
        done = run(checkout, script, "x")
        assert done.returncode != 0
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


OLD = "[[ $1 != --version ]] || { echo Python 3.10.13; exit; }; exit 1"


@pytest.mark.parametrize("command", ["setup", "serve", "serve --help", "test", "check", "bench --help"])
def test_scripts_where_all_pythons_are_too_old(checkout: Path, command: str) -> None:
    done = run(checkout, *command.split(), python=OLD)
    assert done.returncode == 1
    assert "found no Python 3.11 or later" in done.stderr
    assert done.stderr.count("\n") == 1
    if "--help" not in command:
        assert "(found: Python 3.10.13)" in done.stderr


@pytest.mark.parametrize("module", ["tpworker", "tpworker.rank"])
def test_an_old_python_is_told_in_one_line(module: str) -> None:
    program = f"""
import runpy, sys
sys.version_info = (3, 10, 13, "final", 0)
runpy._run_module_as_main({module!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "tpworker needs Python 3.11 or later, and this is 3.10.13: run it with a newer one" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_says_so_can_be_read_by_old_pythons() -> None:
    ast.parse((ROOT / "tpworker/__init__.py").read_text(), feature_version=(3, 7))
