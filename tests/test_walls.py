"""Each folder's place: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def imports(folder: str) -> dict[str, set[str]]:
    """For each file, the modules that it imports, anywhere in it."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / folder).rglob("*.py"):
        modules: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                modules.add(node.module or "")
        found[path.relative_to(ROOT).as_posix()] = modules
    assert found
    return found


def users(folder: str, *prefixes: str) -> dict[str, set[str]]:
    """The files that import one of these modules, or something below it."""
    hits = {
        path: {m for m in modules if any(m == p or m.startswith(f"{p}.") for p in prefixes)}
        for path, modules in imports(folder).items()
    }
    return {path: modules for path, modules in hits.items() if modules}


def ours(folder: str, *allowed: str) -> dict[str, set[str]]:
    """The files that import something of ours that is not allowed."""
    hits = {
        path: {
            m
            for m in modules
            if m.startswith("tpworker") and not any(m == a or m.startswith(f"{a}.") for a in allowed)
        }
        for path, modules in imports(folder).items()
    }
    return {path: modules for path, modules in hits.items() if modules}


def test_ipc_imports_nothing_of_ours_and_no_torch() -> None:
    assert not ours("ipc", "tpworker.ipc")
    assert not users("ipc", "torch", "numpy", "transformers")


def test_the_scheduler_imports_ipc_only() -> None:
    assert not ours("scheduler", "tpworker.ipc", "tpworker.scheduler")
    assert not users("scheduler", "torch", "numpy", "transformers", "zmq")


def test_a_rank_imports_model_and_ipc() -> None:
    assert not ours("tpworker/rank", "tpworker.rank", "tpworker.model", "tpworker.ipc", "tpworker.errors")


def test_the_model_knows_of_no_process() -> None:
    assert not ours("tpworker/model", "tpworker.model", "tpworker.errors")


def test_families_import_no_torch() -> None:
    assert not users("tpworker/model/families", "torch", "transformers")


def test_observing_needs_no_torch_and_no_other_process() -> None:
    assert not ours(
        "tpworker/observe", "tpworker.observe", "tpworker.ipc", "tpworker.model",
        "tpworker.config", "tpworker.errors", "tpworker.runtime.loading", "tpworker.runtime.settings",
    )  # fmt: skip
    for_the_size_of_a_model = {"tpworker/doctor/model_check.py"}
    assert (
        set(users("tpworker/observe", "torch", "tpworker.rank", "tpworker.model")) == for_the_size_of_a_model
    )
    assert set(users("tpworker", "pynvml")) == {"tpworker/observe/nvml.py"}


def test_zmq_is_used_by_the_channels_only() -> None:
    assert set(users("ipc", "zmq")) == {"ipc/channels.py"}
    assert not users("tpworker", "zmq")


def test_chat_templates_are_rendered_without_the_libraries_of_models() -> None:
    assert not ours("tpworker/chat", "tpworker.chat", "tpworker.runtime.children", "tpworker.errors")
    assert not users("tpworker/chat", "torch", "transformers", "tokenizers", "numpy")
    in_the_process = {f"tpworker/chat/{name}.py" for name in ("content", "environment", "process")}
    assert set(users("tpworker", "jinja2")) == in_the_process
    assert not users("tpworker", *(f"tpworker.chat.{name}" for name in ("environment", "process"))).keys() - {
        "tpworker/chat/process.py"
    }


@pytest.mark.parametrize("name", ["ipc", "scheduler"])
def test_only_full_names_are_imported(name: str) -> None:
    for folder in ("ipc", "scheduler", "tpworker", "tests", "benchmarks"):
        assert not users(folder, name)


def test_the_runtime_touches_neither_ranks_nor_torch() -> None:
    top = {
        path: modules
        for path, modules in imports("tpworker").items()
        if path.count("/") == 1 or path.startswith("tpworker/cli/")
    }
    for path, modules in top.items():
        assert not {m for m in modules if m == "torch" or m.startswith(("torch.", "tpworker.rank"))}, path


def test_the_server_is_imported_by_the_command_line_only() -> None:
    importers = {
        path for path in users("tpworker", "tpworker.server") if not path.startswith("tpworker/server/")
    }
    assert importers == {"tpworker/cli/serve.py"}
