"""The rooms: who may import whom. The table of rooms in ARCHITECTURE.md is what is checked."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tpworker.kernels.operations import Operations
from tpworker.model import torch_operations

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tpworker", "ipc", "scheduler")
LONGEST = 400  # lines of a file
WHY_LONGER = "More than 400 lines: "  # and the reason, in the docstring of a kernel's file
ENTRANCE = ("tpworker", "tpworker.__main__")
"""What users import and run: it stands above all rooms."""


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


@cache
def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, in functions and for type checks too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            for alias in node.names:
                within = f"{node.module}.{alias.name}"
                found.add(within if within in MODULES else node.module)
    return found


def name_of(path: Path) -> str:
    """`ipc` and `scheduler` are imported through the links within tpworker."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "tpworker" else ("tpworker", *parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sources(*FOLDERS)}


def floors() -> dict[str, int]:
    """The table in ARCHITECTURE.md: of each room its floor, the lowest 0."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = re.findall(
        r"^\| (`[^|]*) \|", text.partition("## The rooms")[2].partition("\n## ")[0], re.MULTILINE
    )
    return {room: floor for floor, row in enumerate(reversed(rows)) for room in re.findall(r"`(\w+)`", row)}


FLOORS = floors()


def room_of(module: str) -> str:
    return module.split(".")[1]


def users(folder: str, *prefixes: str) -> dict[str, set[str]]:
    """The files that import one of these modules, or something below it."""
    hits = {
        path.relative_to(ROOT).as_posix(): {
            m for m in imports(path) if any(m == p or m.startswith(f"{p}.") for p in prefixes)
        }
        for path in sources(folder)
    }
    return {path: modules for path, modules in hits.items() if modules}


# ------------------------------------------------------------------------------------- rooms


def test_every_room_has_its_row_and_every_row_its_room() -> None:
    assert {room_of(module) for module in MODULES if module not in ENTRANCE} == set(FLOORS)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {*ENTRANCE}))
def test_a_room_imports_only_what_stands_below_it(module: str) -> None:
    for imported in imports(MODULES[module]) & set(MODULES):
        assert imported not in ENTRANCE, f"{module} imports {imported}, which imports everything"
        own, other = room_of(module), room_of(imported)
        assert own == other or FLOORS[other] < FLOORS[own] or not FLOORS[own], (
            f"{module} imports {imported}, and {other} does not stand below {own}"
        )


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports; empty: there is none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for imported in sorted(graph[module]):
            if circle := search(imported, [*path, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in graph if (circle := search(module, []))), [])


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle_in({m: imports(path) & set(MODULES) for m, path in MODULES.items()}) == []
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize("name", ["ipc", "scheduler"])
def test_only_full_names_are_imported(name: str) -> None:
    for folder in (*FOLDERS, "tests", "benchmarks"):
        assert not users(folder, name)


def test_the_server_is_imported_by_the_command_line_and_by_integrations_only() -> None:
    importers = {
        path for path in users("tpworker", "tpworker.server") if not path.startswith("tpworker/server/")
    }
    integrations = {f"tpworker/integrations/{name}.py" for name in ("options", "ray")}
    assert importers == {"tpworker/cli/serve.py", *integrations}


def test_an_engine_is_imported_by_its_integration_only() -> None:
    assert set(users("tpworker", "ray")) == {"tpworker/integrations/ray.py"}


def test_no_file_is_long_but_for_a_kernel_that_says_why() -> None:
    longer = {path for path in MODULES.values() if len(path.read_text().splitlines()) > LONGEST}
    assert {room_of(name_of(path)) for path in longer} <= {"kernels"}
    assert all(WHY_LONGER in (ast.get_docstring(ast.parse(path.read_text())) or "") for path in longer)


# --------------------------------------------------------------------------------- libraries


def test_the_wire_and_the_scheduler_need_no_library_of_models() -> None:
    for folder in ("ipc", "scheduler"):
        assert not users(folder, "torch", "numpy", "transformers")


def test_zmq_is_used_by_the_channels_and_by_events_for_routers_only() -> None:
    assert {path for folder in FOLDERS for path in users(folder, "zmq")} == {
        "ipc/channels.py",
        "ipc/kv_events.py",
    }


def test_prometheus_is_known_to_metrics_and_the_server_only() -> None:
    rooms = {path.split("/")[1] for path in users("tpworker", "prometheus_client")}
    assert rooms == {"metrics", "server"}
    assert not users("tpworker/metrics", "tpworker.runtime").keys() - {"tpworker/metrics/metrics.py"}


def test_torch_is_used_where_tensors_are() -> None:
    for_types = {"tpworker/runtime/changeable.py", "tpworker/runtime/sync.py"}  # of what its callers have
    rooms = {path.split("/")[1] for path in users("tpworker", "torch").keys() - for_types}
    assert rooms == {"kernels", "model", "checkpoint", "rank", "testing", "doctor"}
    for_the_size_of_a_model = {"tpworker/doctor/model_check.py"}
    assert set(users("tpworker/doctor", "torch", "tpworker.model")) == for_the_size_of_a_model


def test_which_kernels_serve_is_decided_in_one_place() -> None:
    """And nothing that runs a step asks where its tensors are."""
    assert set(users("tpworker", "tpworker.kernels.cuda_operations")) == {"tpworker/model/operations.py"}
    asking = {path.relative_to(ROOT).as_posix() for path in MODULES.values() if "is_cuda" in path.read_text()}
    assert not asking
    contract = {name for name, value in vars(Operations).items() if callable(value) and name[0] != "_"}
    assert set(torch_operations.__all__) == contract
    cuda = ast.parse(MODULES["tpworker.kernels.cuda_operations"].read_text())  # it imports Triton
    named = next(node.value for node in cuda.body if isinstance(node, ast.Assign))
    assert set(ast.literal_eval(named)) == contract


def test_a_model_is_known_without_torch() -> None:
    """So that the runtime refuses it before a process is started."""
    light = ("resolve", "weight_files")
    for path in ("tpworker/model/families", *(f"tpworker/checkpoint/{name}.py" for name in light)):
        folder, _, name = path.rpartition("/")
        hits = users(path if not name.endswith(".py") else folder, "torch", "transformers")
        assert not {hit for hit in hits if hit.startswith(path)}


def test_the_driver_is_asked_in_one_place() -> None:
    assert set(users("tpworker", "pynvml")) == {"tpworker/observe/nvml.py"}


def test_chat_templates_are_rendered_without_the_libraries_of_models() -> None:
    assert not users("tpworker/chat", "torch", "transformers", "tokenizers", "numpy")
    in_the_process = {f"tpworker/chat/{name}.py" for name in ("content", "environment", "process")}
    assert set(users("tpworker", "jinja2")) == in_the_process
    assert not users("tpworker", *(f"tpworker.chat.{name}" for name in ("environment", "process"))).keys() - {
        "tpworker/chat/process.py"
    }


def test_bounded_processes_know_nothing_of_their_work() -> None:
    """So that whatever runs in one pays for no library but its own."""
    assert not users(
        "tpworker/bounded", "torch", "transformers", "tokenizers", "numpy", "jinja2", "llguidance"
    )
    assert not users("tpworker/bounded", "tpworker.chat", "tpworker.grammar")
