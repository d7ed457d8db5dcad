"""The images, the manifests and the unit say what the code does: options, routes, ports, folders, times."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.test_grafana import Page, expressions, page  # noqa: F401
from tests.server.fake_runtime import FakeRuntime
from tpworker.cli.options import Options, parse
from tpworker.cli.server_options import API_KEY_VARIABLE
from tpworker.server import create_app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()
UNIT = (DEPLOY / "systemd" / "tpworker.service").read_text()
SLOTS_IN_USE = 0.75
"""The share of --max-num-seqs that an autoscaler aims at: docs/observability.md."""


def instructions(name: str) -> list[str]:
    """Of the Dockerfile, without its comments."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return re.findall(rf"^{name} (.*)$", text, re.MULTILINE)


def command() -> list[str]:
    (entry,) = instructions("ENTRYPOINT")
    tini, dashes, *words = json.loads(entry)  # in exec form: no shell stands between
    assert (tini, dashes, words[0]) == ("tini", "--", "tpworker")
    return words[1:]


def manifest(file: str, kind: str) -> Any:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / file).read_text())
    return next(document for document in documents if document["kind"] == kind)


def pod() -> Any:
    return manifest("tpworker.yaml", "Deployment")["spec"]["template"]


def serve(words: list[str]) -> Options:
    options = parse(words)
    assert isinstance(options, Options)
    return options


def routes() -> set[str]:
    runtime = FakeRuntime()
    try:
        return {route.path for route in create_app(runtime).routes}  # type: ignore[attr-defined,arg-type]
    finally:
        assert runtime.the_tokenizer is not None
        runtime.the_tokenizer.close()


def unit(section: str) -> dict[str, list[str]]:
    """What stands in the unit, by key: a key may come more than once."""
    text = UNIT.partition(f"[{section}]")[2].partition("\n[")[0]
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def test_an_image_serves_where_its_health_check_asks() -> None:
    options = serve(command())
    (check,) = instructions("HEALTHCHECK")
    asked = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", check)
    assert asked is not None
    assert int(asked[1]) == options.port == int(instructions("EXPOSE")[0])
    assert asked[2] in routes()
    assert options.host == "0.0.0.0", "it is reached from outside"


def test_an_image_is_not_roots_and_writes_to_its_cache_alone() -> None:
    made = re.search(r"useradd --uid (\d+)", DOCKERFILE)
    assert made is not None
    assert set(instructions("USER")) == {f"{made[1]}:{made[1]}"}
    targets = re.findall(r"FROM server AS (\w+)(.*?)(?=^FROM|\Z)", DOCKERFILE, re.DOTALL | re.MULTILINE)
    assert {name for name, _ in targets} == {"cpu", "cuda"}
    assert all("\nUSER " in text for _, text in targets)
    (variables,) = [line for line in instructions("ENV") if "XDG_CACHE_HOME" in line]
    folders = re.findall(r"(?:CACHE\w*|HF_HOME)=(\S+)", variables)
    assert len(folders) == 4
    assert all(folder.startswith("/cache") for folder in folders)


def test_what_an_image_is_built_from_is_given_to_the_build() -> None:
    given = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert all((ROOT / name).exists() for name in given)
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    read = settings["metadata"]["long_description"].removeprefix("file: ")
    links = [path.resolve().name for path in (ROOT / "tpworker").iterdir() if path.is_symlink()]
    needed = {read, settings["metadata"]["license_files"], "setup.cfg", "pyproject.toml", "constraints.txt"}
    assert needed | {"tpworker", *links} <= set(given)
    extras = {extra for list_ in re.findall(r"'\.\[([\w,-]+)\]'", DOCKERFILE) for extra in list_.split(",")}
    assert extras <= set(settings["options.extras_require"])
    assert extras >= {"server", "cuda"}


def test_a_pod_runs_the_image_with_options_that_exist() -> None:
    (container,) = pod()["spec"]["containers"]
    options = serve([*command(), *container["args"]])
    (port,) = container["ports"]
    assert port["containerPort"] == options.port
    assert container["resources"]["limits"]["nvidia.com/gpu"] == options.config.tensor_parallel_size
    wanted = SLOTS_IN_USE * (options.config.max_num_seqs or 0)
    (trigger,) = manifest("keda.yaml", "ScaledObject")["spec"]["triggers"]
    (metric,) = manifest("hpa.yaml", "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert float(trigger["metadata"]["threshold"]) == wanted
    assert float(metric["pods"]["target"]["averageValue"]) == wanted
    assert API_KEY_VARIABLE in {variable["name"] for variable in container["env"]}


def test_a_pod_is_given_the_time_to_end_what_it_has_begun() -> None:
    spec = pod()["spec"]
    (container,) = spec["containers"]
    timeout = serve([*command(), *container["args"]]).shutdown_timeout
    assert timeout is not None
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] >= pause + timeout + 10


def test_probes_and_monitors_ask_for_what_there_is(page: Page) -> None:  # noqa: F811
    (container,) = pod()["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    for name, path in (("startup", "/health"), ("liveness", "/health"), ("readiness", "/ready")):
        probe = container[f"{name}Probe"]["httpGet"]
        assert (probe["path"], probe["port"] in ports) == (path, True)
    labels = pod()["metadata"]["labels"]
    monitor = manifest("podmonitor.yaml", "PodMonitor")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in ports
    assert {"/health", "/ready", endpoint["path"]} <= routes()
    assert labels[monitor["jobLabel"]] == "tpworker", "the job that alerts ask for"
    for selector in (
        monitor["selector"]["matchLabels"],
        manifest("tpworker.yaml", "Deployment")["spec"]["selector"]["matchLabels"],
        manifest("tpworker.yaml", "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        manifest("tpworker.yaml", "Service")["spec"]["selector"],
    ):
        assert selector.items() <= labels.items()
    (metric,) = manifest("hpa.yaml", "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in page


def test_a_pod_has_the_images_user_and_a_place_for_all_that_it_writes() -> None:
    spec = pod()["spec"]
    (container,) = spec["containers"]
    assert (
        f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}"
        == instructions("USER")[0]
    )
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {"/cache", "/tmp", "/dev/shm"}
    assert set(mounts.values()) == {volume["name"] for volume in spec["volumes"]}


def test_kustomize_has_files_that_exist() -> None:
    text = (DEPLOY / "kubernetes" / "kustomization.yaml").read_text()
    files = re.findall(r"[\w-]+\.yaml", text)
    assert files
    assert all((DEPLOY / "kubernetes" / file).is_file() for file in files)


def test_the_unit_starts_a_server_and_gives_it_the_time_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    service = unit("Service")
    (line,) = service["ExecStart"]
    program, *words = line.split()
    assert Path(program).name == "tpworker"
    file = words[words.index("--config") + 1]
    words[words.index("--config") + 1] = str(DEPLOY / "systemd" / Path(file).name)
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    options = serve(words)
    assert options.shutdown_timeout is not None
    assert float(service["TimeoutStopSec"][0]) >= options.shutdown_timeout + 10
    assert API_KEY_VARIABLE in (DEPLOY / "systemd" / "environment").read_text()
    (folder,) = service["CacheDirectory"]
    for variable in re.findall(r"\w*(?:CACHE\w*|HOME)=(\S+)", " ".join(service["Environment"])):
        assert variable.startswith(f"/var/cache/{folder}")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (Debian: systemd)")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / "tpworker.service"
    copy.write_text(re.sub("(?<=^ExecStart=)\\S+", shutil.which("true") or "", UNIT, flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
