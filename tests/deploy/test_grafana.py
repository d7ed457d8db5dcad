"""The dashboard and the alerts ask for what /metrics has; Prometheus reads its files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from tests.deploy.promql import asked
from tests.metrics.test_metrics import board_of
from tests.observe.fake_nvml import FakeNvml
from tests.server.fake_runtime import FakeRuntime
from tests.server.test_metrics import gpu_states
from tpworker.config import RuntimeConfig
from tpworker.metrics import Metrics, metrics
from tpworker.observe.snapshot import Snapshot
from tpworker.server.timing import FrontMetrics

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "grafana"
DASHBOARD = json.loads((FOLDER / "dashboards" / "tpworker.json").read_text())
PANELS = DASHBOARD["panels"]
OF_TARGETS = {"job", "instance", "namespace", "pod"}
"""Labels that Prometheus adds to all that it scrapes."""

Page = dict[str, dict[str, set[str]]]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def used(seen: Snapshot, gpus: object) -> Snapshot:
    """As if its processes were alive."""
    usage: dict[str, Any] = {"cpu_seconds": 1.5, "memory_bytes": 1 << 20}
    ranks = tuple(replace(rank, **usage) for rank in seen.ranks)
    return replace(seen, scheduler=replace(seen.scheduler, **usage), ranks=ranks)


@pytest.fixture(scope="module")
def page() -> Page:
    """Of each metric of a server that has all of them: its labels, and what these say."""
    runtime = FakeRuntime(
        configured=RuntimeConfig(speculative_method="ngram", num_speculative_tokens=2),
        draft_tokens=(2, 1),
        accepted_tokens=(1, 1),
        gpu_states=gpu_states(FakeNvml(["GPU-a"])),
    )
    registry: CollectorRegistry = Metrics(runtime).registry  # type: ignore[arg-type]
    registry.register(FrontMetrics())
    found: Page = defaultdict(lambda: defaultdict(set))
    with closing(board_of(2, (500,))) as runtime.board, pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "with_usage", used)
        collected = list(registry.collect())
    for metric in collected:
        for sample in metric.samples:
            found[sample.name].update()
            for label, value in sample.labels.items():
                found[sample.name][label].add(value)
    assert runtime.the_tokenizer is not None
    runtime.the_tokenizer.close()
    return {name: dict(labels) for name, labels in found.items()}


def expressions() -> Iterator[tuple[str, str]]:
    """All of them, with where they stand."""
    for panel in PANELS:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        if "expr" in annotation:
            yield annotation["name"], annotation["expr"]
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
    keda = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "keda.yaml").read_text())
    for trigger in keda["spec"]["triggers"]:
        yield "keda.yaml", trigger["metadata"]["query"]


def wrong_with(expression: str, page: Page, recorded: set[str]) -> list[str]:
    """What of it a server does not have."""
    wrong = []
    selectors, grouped = asked(expression)
    known: set[str] = set(OF_TARGETS)
    for name, matchers in selectors:
        if name in recorded or name == "up":
            continue
        if name not in page:
            wrong.append(f"no metric {name}")
            continue
        labels = page[name]
        known |= labels.keys()
        for label, operator, value in matchers:
            if label not in labels and label not in OF_TARGETS:
                wrong.append(f"{name} has no label {label}")
            elif label in labels and not value.startswith("$"):
                values = value.split("|") if operator.endswith("~") else [value]
                wrong += [f"{name} has no {label}={one}" for one in values if one not in labels[label]]
    return wrong + [f"no label {label}" for label in sorted(grouped - known)]


def test_all_that_is_asked_for_exists(page: Page) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    found = {
        f"{where}: {expression}": wrong
        for where, expression in expressions()
        if (wrong := wrong_with(expression, page, recorded))
    }
    assert not found


@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        ("rate(tpworker_step_total[5m])", ["no metric tpworker_step_total"]),
        ('tpworker_requests_total{result="ok"}', ["tpworker_requests_total has no label result"]),
        ('tpworker_requests_total{outcome=~"ok|bad"}', ["tpworker_requests_total has no outcome=bad"]),
        ("sum by (state, gpu) (tpworker_runtime_state)", ["no label gpu"]),
        (
            'a{le="3.0"} / b:c',
            ["no metric a", "no metric b:c"],
        ),
    ],
)
def test_what_does_not_exist_is_found(page: Page, expression: str, wrong: list[str]) -> None:
    assert wrong_with(expression, page, set()) == wrong


def test_variables_ask_for_what_exists(page: Page) -> None:
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variable["definition"])
            assert found is not None
            assert found[2] in page[found[1]].keys() | OF_TARGETS
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used - {"__rate_interval", "__all"} == names


def test_legends_name_labels_that_their_queries_keep(page: Page) -> None:
    for panel in PANELS:
        for target in panel.get("targets", ()):
            selectors, grouped = asked(target["expr"])
            sums = re.search(r"\bsum\b|quantile", target["expr"])
            kept = grouped if sums else page[selectors[0][0]].keys() | OF_TARGETS
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, panel["title"]


def test_panels_have_places_of_their_own() -> None:
    cells = set()
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not mine & cells, panel["title"]
        cells |= mine
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)


def test_prometheus_and_grafana_find_each_other_and_their_files() -> None:
    compose = yaml.safe_load((FOLDER / "docker-compose.yaml").read_text())["services"]
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    provisioning = FOLDER / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    (address,) = [word for word in compose["prometheus"]["command"] if "listen-address" in word]
    assert source["url"] == f"http://{address.partition('=')[2]}"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    (job,) = config["scrape_configs"]
    files = [*config["rule_files"], *job["file_sd_configs"][0]["files"]]
    assert all((FOLDER / file).is_file() for file in files)
    (provider,) = yaml.safe_load((provisioning / "dashboards/tpworker.yaml").read_text())["providers"]
    mounted = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    assert mounted["./dashboards"] == provider["options"]["path"]
    for service in compose.values():
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", service["image"]), "a version that stays"
        local = [volume.split(":")[0] for volume in service["volumes"] if volume.startswith(".")]
        assert all((FOLDER / path).exists() for path in local)


def test_alerts_ask_for_the_job_that_there_is() -> None:
    (job,) = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]
    jobs = {
        value
        for _, expression in expressions()
        for _, matchers in asked(expression).selectors
        for label, _, value in matchers
        if label == "job"
    }
    assert jobs == {job["job_name"]}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
@pytest.mark.parametrize(
    "command", ["check config deploy/grafana/prometheus.yaml", "test rules tests/deploy/alerts.yaml"]
)
def test_promtool(command: str) -> None:
    done = subprocess.run(["promtool", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
