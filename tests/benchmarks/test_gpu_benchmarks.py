"""What the GPU benchmarks make of what GPUs tell: on lists of kernels that are made up, and on CPU ranks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.common.floors import BYTES_PER_SECOND, floor_bytes, floor_ms
from benchmarks.common.options import num_stand_ins, why_not
from benchmarks.common.quantized import quantized
from benchmarks.common.report import told_ranks
from benchmarks.common.timeline import main as draw
from benchmarks.steps import gpu, stand_ins, table
from benchmarks.steps.gpu import print_tables
from benchmarks.steps.gpu_rank import collect
from benchmarks.steps.gpu_run import Case, _compared, measure
from benchmarks.steps.gpu_tables import Row, measure_and_tell, quantiles
from benchmarks.steps.gpu_trace import UNSETTLED, Trace, TraceFailed, covered, figures, kind_of
from benchmarks.steps.gpu_trace import timeline as timeline_of
from benchmarks.steps.routing import UniformRouting
from benchmarks.steps.table import gain, later, print_table
from tests.absent_gpu import needs_triton
from tests.conftest import TINY_CONFIG
from tpworker.checkpoint.weights import dummy_weights
from tpworker.model.families import read_spec
from tpworker.model.moe import Moe
from tpworker.model.tp import Shard
from tpworker.outputs import StepRecord
from tpworker.rank.cuda_collectives import NcclCollectives

ROOT = Path(__file__).resolve().parents[2]
STEP = 100_000  # ns from a step's start to the next one's
NAMES = ["_add_norm", "one_shot_all_reduce_kernel", "nvjet_sm90_gemm", "index_put"]
NORM, SUM, PRODUCT, GRANT = range(4)


def collected(num_steps: int, late: int = 0, grant_at: int = -1, gap: int = 10_000) -> dict[str, Any]:
    """A rank's trace: each step a norm, two all-reduces and a product, 2 µs idle before the product.

    Args:
        late: ns that this rank is before the others at a step's first all-reduce, and waits there.
        grant_at: the step before which a kernel of 3 µs applies a grant.
    """
    kernels, launches = [], []
    for step in range(num_steps):
        start = step * STEP
        end = start + STEP - gap
        kernels += [
            (step, NORM, start, 1000),
            (step, SUM, start + 1000, 5000 + late),
            (step, SUM, start + 6000 + late, 7000),
            (step, PRODUCT, start + 15_000 + late, end - start - 15_000 - late),
        ]
        launches.append((start - 150_000, 4000))
        if step == grant_at:
            kernels.append((-1, GRANT, start - 5000, 3000))
    return {"first_step": 40, "names": NAMES, "calls": {"cudaGraphLaunch": num_steps}, "launches": launches,
            "kernels": kernels}  # fmt: skip


@dataclass
class Event:
    """Of the profiler, as torch gives it."""

    what: str
    on_gpu: bool
    start: int
    duration: int
    correlation: int

    def name(self) -> str:
        return self.what

    def device_type(self) -> Any:
        return torch.autograd.DeviceType.CUDA if self.on_gpu else torch.autograd.DeviceType.CPU

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.duration

    def correlation_id(self) -> int:
        return self.correlation


def test_what_a_rank_collects_of_a_profiler() -> None:
    events = [
        Event("cudaGraphLaunch", False, 900, 5, 12),
        Event("cudaGraphLaunch", False, 500, 5, 11),
        Event("cudaLaunchKernel", False, 950, 5, 13),
        Event("aten::add", False, 950, 5, 0),
        Event("_attend", True, 1100, 10, 11),
        Event("_add_norm", True, 1000, 50, 11),
        Event("Memset (Device)", True, 1060, 5, 11),
        Event("index_put", True, 1200, 5, 13),
        Event("Memcpy DtoH (Device -> Pinned)", True, 1300, 5, 14),
        Event("Activity Buffer Request", True, 1400, 5, 0),
        Event("_add_norm", True, 2000, 50, 12),
    ]
    profiler = SimpleNamespace(
        profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))
    )
    found = collect(profiler, 7)
    assert found["first_step"] == 7
    assert found["calls"] == {"cudaGraphLaunch": 2, "cudaLaunchKernel": 1}
    assert found["launches"] == [(-500, 5), (-100, 5)]
    kernels = sorted((launch, found["names"][name], *times) for launch, name, *times in found["kernels"])
    assert kernels == [
        (-1, "index_put", 200, 5),
        (0, "Memset (Device)", 60, 5),
        (0, "_add_norm", 0, 50),
        (0, "_attend", 100, 10),
        (1, "_add_norm", 1000, 50),
    ]


def test_figures_of_a_trace() -> None:
    traces = [Trace.of(collected(31, late=2500)), Trace.of(collected(31))]
    row = figures(traces)
    assert row["traced_steps"] == 20
    assert row["kernels"] == 4
    assert row["gap_p50_us"] == row["gap_p99_us"] == 10
    assert row["idle_inside_us"] == 2
    assert row["kinds_us"] == {"all-reduce": 14.5, "products": 90 - 17.5, "norms": 1.0}
    assert row["all_reduce_us"] == 14.5
    assert row["all_reduce_own_us"] == 12
    assert row["skew_p50_us"] == 2.5
    assert row["last_rank"] == [0, 1]
    assert row["slowest"][0] == ("nvjet_sm90_gemm", 1, 72.5)


def test_what_applies_deltas_between_two_steps_is_not_idle_time() -> None:
    row = figures([Trace.of(collected(31, grant_at=20))])
    assert (row["gap_p50_us"], row["gap_p99_us"]) == (10, 10)
    trace = Trace.of(collected(31, grant_at=20))
    trace = replace(trace, others=[replace(other, end=other.end + 60_000) for other in trace.others])
    assert figures([trace])["gap_p50_us"] == 10, "only what lies between the steps counts"
    few = Trace.of(collected(21 + UNSETTLED, grant_at=UNSETTLED + 1))
    gaps = sorted(
        figures([replace(few, steps=dict(list(few.steps.items())[:count]))])["gap_p50_us"] for count in (2, 3)
    )
    assert gaps == [7, 7], "a grant before the second step leaves 7 of 10 µs"
    assert "skew_p50_us" not in row, "one rank waits for nobody"


def test_steps_bear_their_numbers_and_edges_are_left_out() -> None:
    trace = Trace.of(collected(31))
    assert list(trace.steps) == list(range(40 + UNSETTLED, 70))
    assert trace.launches[55] == (15 * STEP - 150_000, 15 * STEP - 146_000)
    with_a_small_graph = collected(31)
    with_a_small_graph["launches"].append((0, 10))
    with_a_small_graph["kernels"].append((31, GRANT, 5, 10))
    assert list(Trace.of(with_a_small_graph).steps) == list(trace.steps), "it is no step"


def test_a_trace_that_shows_nothing_says_so() -> None:
    for bad in (collected(15), {"error": "no CUPTI"}, collected(31) | {"kernels": []}):
        with pytest.raises(TraceFailed, match=r"no CUPTI|whole steps"):
            Trace.of(bad)


def test_kernels_that_overlap_are_counted_once() -> None:
    kernels = Trace.of(collected(31)).steps[60]
    assert covered(kernels) == 88_000
    twice = sorted([*kernels, *kernels], key=lambda kernel: kernel.start)
    assert covered(twice) == 88_000


def test_a_kernel_that_starts_early_counts_from_the_end_of_the_one_before() -> None:
    early = collected(31)
    early["kernels"] = [
        (step, name, start - 4000 if name == PRODUCT else start, length + 4000 if name == PRODUCT else length)
        for step, name, start, length in early["kernels"]
    ]
    row = figures([Trace.of(early)])
    assert row["kinds_us"] == {"all-reduce": 12, "products": 77, "norms": 1}
    assert row["idle_inside_us"] == 0


def test_what_puts_parts_together_is_of_the_kind_of_its_parts() -> None:
    parts = collected(31)
    parts["names"] = ["_attend", "_combine", "_down", "index_put"]
    kernels = Trace.of(parts).steps[60]
    assert [kernel.kind for kernel in kernels] == ["attention", "attention", "attention", "experts"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("one_shot_all_reduce_kernel<c10::BFloat16, 2>", "all-reduce"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-reduce"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...", "attention"),
        ("_attend", "attention"),
        ("nvjet_sm90_tst_64x8_64x16_2x1_v_bz_TNN", "products"),
        ("_one_row", "products"),
        ("_down_dense", "experts"),
        ("_reduce_add_norm", "all-reduce"),
        ("_argmax", "all-reduce"),
        ("_add_norm", "norms"),
        ("_norm_rotate_store", "norms"),
        ("_best_of_block", "sampling"),
        ("void at::native::index_copy_kernel_impl", "other"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_steps_to_be_drawn() -> None:
    drawn = timeline_of(Trace.of(collected(31)), 4)["steps"]
    assert [step["step"] for step in drawn] == [58, 59, 60, 61]
    assert drawn[0]["kernels"][0] == ["norms", 0.0, 1.0]
    assert drawn[1]["kernels"][0][1] == 100.0
    assert drawn[1]["launch"] == [-50.0, 4.0]


def test_a_picture_of_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"model": "qwen3-8b", "ranks": 2, "batch": 64, "lookahead": lookahead, "tpot_ms": 0.1}
        | timeline_of(Trace.of(collected(31, gap=gap)))
        for lookahead, gap in ((2, 5_000), (0, 40_000))
    ]
    file, picture = tmp_path / "steps.json", tmp_path / "steps.png"
    file.write_text(json.dumps({"machine": {"gpus": ["NVIDIA H200"]}, "rows": rows}))
    shape = ["--model", "qwen3-8b", "--tp", "2", "--batch"]
    assert draw([str(file), str(picture), *shape, "64"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert draw([str(file), str(picture), *shape, "16"]) == 1
    assert "holds no such row" in capsys.readouterr().err


def steps(*ends_us: int) -> list[StepRecord]:
    return [StepRecord(10 + i, 0, 2, 0, 0, end * 1000) for i, end in enumerate(ends_us)]


def test_steps_beside_their_graphs_at_equal_lengths() -> None:
    # Step 12 decodes sequences of 100 tokens; the first steps are left out until the batch has settled.
    records = steps(*(1000 * i for i in range(20)))
    noted = {"first_step": 12, "length": 100.0, "single_ms": [(105, 1.0), (110, 1.01), (115, 1.07)]}
    row = _compared(records, noted, [(100, 0.9), (110, 1.0), (120, 1.1)])
    assert row["steps"] == 13
    assert row["tpot_ms"] == 1.0
    assert row["length"] == 111
    assert row["graph_ms"] == pytest.approx(1.01)
    assert row["over_p50_us"] == pytest.approx(-10)
    assert row["over_p99_us"] == pytest.approx(50), "of step 17, of 105 tokens"
    assert row["over_us"][0] == (105, pytest.approx(50))
    assert row["spread_us"] == [(105, 50), (110, 10), (115, 20)]
    assert row["spread_p50_us"] == pytest.approx(20)
    assert row["spread_p99_us"] == pytest.approx(50), "of the first, of 105 tokens"
    assert "spread_p50_us" not in _compared(records, noted | {"single_ms": []}, [(100, 0.9), (120, 1.1)])
    assert _compared(records[:4], noted, []) == {}
    assert "graph_ms" not in _compared(records, noted, [])


def test_the_floor_is_every_weight_once_but_the_embedding_and_the_keys_and_values(tmp_path: Path) -> None:
    for tied in (False, True):
        (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG | {"tie_word_embeddings": tied}))
        spec = read_spec(tmp_path)
        shard = Shard.of(spec, 0, 2)
        size, heads, kv_heads = spec.hidden_size, shard.num_heads, shard.num_kv_heads
        attention = size * (2 * heads + 2 * kv_heads) * spec.head_dim
        layer = attention + 3 * size * shard.mlp.local + 2 * size
        head = size * shard.vocab.local + size
        keys_and_values = 2 * spec.num_layers * kv_heads * spec.head_dim
        expected = 2 * (spec.num_layers * layer + head + 3 * size + 3 * 50 * keys_and_values)
        assert floor_bytes(spec, shard, 3 * 50, 3) == expected
        assert floor_ms(spec, 2, 3, 50) == pytest.approx(1e3 * expected / BYTES_PER_SECOND)


def test_floors_of_the_models_measured() -> None:
    """Those that docs/benchmarks.md's peer was given, from elsewhere: 0.3, 4.6, 5.0 and 1.8 ms."""
    floors = [("qwen3-0.6b", 1, 1, 0.29), ("qwen3-0.6b", 1, 256, 4.72), ("qwen3-8b", 1, 64, 4.95),
              ("qwen3-8b", 2, 1, 1.77)]  # fmt: skip
    for model, ranks, batch, milliseconds in floors:
        spec = read_spec(ROOT / "benchmarks/configs" / model)
        assert floor_ms(spec, ranks, batch, 650) == pytest.approx(milliseconds, abs=0.01)


def test_weights_in_fp8_are_half_the_bytes_to_read() -> None:
    """But for the output head; scales and norms are little."""
    spec = read_spec(ROOT / "benchmarks/configs/qwen3-8b")
    assert quantized(spec, None) is spec
    shard = Shard.of(spec, 0, 1)
    head = 2 * spec.vocab_size * spec.hidden_size
    layers = floor_bytes(spec, shard, 0) - head
    for kind in ("fp8", "fp8-blocks"):
        halves = floor_bytes(quantized(spec, kind), shard, 0) - head
        assert halves == pytest.approx(layers / 2, rel=2e-3)


def test_cells() -> None:
    assert quantiles({"gap_p50_us": 4.44, "gap_p99_us": 10.0}, "gap", 1) == "4.4 / 10.0"
    assert quantiles({}, "gap", 1) == "–"


def tiny_glm(folder: Path) -> None:
    """GLM-4.5-Air's config with 8 experts and small numbers."""
    config = json.loads((ROOT / "benchmarks/configs/glm-4.5-air/config.json").read_text())
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "num_nextn_predict_layers": 0}
    words = {"vocab_size": 300, "torch_dtype": "float32", "pad_token_id": 0, "eos_token_id": [1]}
    config |= sizes | heads | experts | words
    (folder / "config.json").write_text(json.dumps(config))


def test_experts_that_nobody_goes_to_are_not_read(tmp_path: Path) -> None:
    tiny_glm(tmp_path)
    spec = read_spec(tmp_path)
    shard = Shard.of(spec, 0, 1)
    saved = floor_bytes(spec, shard, 0, 1) - floor_bytes(spec, shard, 0, 1, touched=4.5)
    assert spec.moe is not None
    idle = 8 + spec.moe.num_shared - 4.5
    assert saved == pytest.approx(2 * idle * 3 * 16 * 32 * 2), "in two layers; the first one is dense"


def test_uniform_routing(tmp_path: Path) -> None:
    tiny_glm(tmp_path)
    spec = read_spec(tmp_path)
    step = torch.zeros(1, dtype=torch.int64)
    chosen = []
    for rank in range(2):
        weights = dummy_weights(spec, Shard.of(spec, rank, 2), torch.float32, torch.device("cpu"))
        mixtures = [layer.mlp for layer in weights.layers if isinstance(layer.mlp, Moe)]
        routing = UniformRouting(mixtures, step)
        step.zero_()
        ids = []
        for _ in range(300):
            ids.append(torch.stack([moe.router(torch.randn(4, 32))[0] for moe in mixtures]))
            step += 1
        chosen.append(torch.stack(ids))  # [steps, layers, rows, k + S]
    assert torch.equal(chosen[0], chosen[1]), "whatever a rank's own router says, all choose alike"
    routed = chosen[0][..., :2]
    assert (routed[..., 0] != routed[..., 1]).all(), "no expert twice for one token"
    assert (chosen[0][..., 2] == 8).all(), "the shared expert, always"
    share = torch.bincount(routed.flatten(), minlength=8) / routed.numel()
    assert share.sub(1 / 8).abs().max() < 0.02
    layers = chosen[0].unbind(1)
    assert not torch.equal(layers[0], layers[1])
    expected = 8 * (1 - (6 / 8) ** 4) + 1
    assert routing.touched(4) == pytest.approx(expected, abs=0.4)
    out = mixtures[0](torch.randn(4, 32))
    assert out.shape == (4, 32)


def test_shapes_of_one_gpu_are_measured_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, str]] = []

    class Child:
        """Writes what `bench gpu` of one model would."""

        def __init__(self, command: list[str], env: dict[str, str], stdout: int) -> None:
            self.args = command
            options = dict(pairwise(command))
            self.returncode = int(options["--shapes"] == "b:1")
            started.append((options["--shapes"], env["CUDA_VISIBLE_DEVICES"]))
            assert (options["--batch"], options["--slots"], options["--step-tokens"]) == ("16", "32", "64")
            assert options["--sampling"] == "random"
            if self.returncode:
                return
            row = {"model": options["--shapes"], "lookahead": 2, "batch": 16}
            Path(options["--json"]).write_text(json.dumps({"rows": [row, row | {"lookahead": 0}]}))
            Path(options["--timeline"]).write_text(json.dumps({"rows": [row | {"steps": [1]}]}))

        def wait(self) -> int:
            return self.returncode

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(gpu.subprocess, "Popen", Child)
    options = argparse.Namespace(lookahead=[2, 0], batch=[16], slots=32, step_tokens=64, sampling="random")
    rows = gpu.together(["a", "b", "c"], options, 2)
    assert started == [("a:1", "2"), ("b:1", "3"), ("c:1", "2")]
    assert [row["model"] for row in rows] == ["a:1", "a:1", "c:1", "c:1"], "one that fails spoils no other"
    assert [row["timeline"] for row in rows[:2]] == [{"steps": [1]}, None]


def test_what_was_measured_before_an_error_is_written_and_told(tmp_path: Path) -> None:
    def measured() -> Iterator[list[Row]]:
        yield [{"model": "a", "timeline": {"steps": [1]}}]
        assert [row["model"] for row in json.loads(file.read_text())["rows"]] == ["a"], "written at once"
        yield [{"model": "b", "timeline": None}]
        raise KeyboardInterrupt

    file, steps = tmp_path / "rows.json", tmp_path / "steps.json"
    options = argparse.Namespace(json=str(file), timeline=str(steps), commit="abc")
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        measure_and_tell(options, measured(), lambda rows: told.extend(row["model"] for row in rows))
    assert told == ["a", "b"]
    written = json.loads(file.read_text())
    assert written["machine"]["commit"] == "abc"
    assert written["rows"] == [{"model": "a"}, {"model": "b"}]
    assert [row["steps"] for row in json.loads(steps.read_text())["rows"]] == [[1]]


def table_row(lookahead: int, tpot_ms: float) -> dict[str, Any]:
    return {"model": "glm-4.5-air", "ranks": 8, "batch": 4, "num_prompt": 500, "num_output": 400,
            "whole_output": 10_000, "lookahead": lookahead, "tpot_ms": tpot_ms, "trace_failed": "no GPU",
            "graphs": [(600.0, 4.0), (5500.0, 4.4)]}  # fmt: skip


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [table_row(2, 4.0), table_row(0, 6.0)]
    assert gain(rows[0], rows) == 1.5
    assert gain(rows[1], rows) is None
    assert gain(rows[0], rows[:1]) is None
    assert later(rows[0]) == 4.4
    assert later(rows[0] | {"graphs": [(700.0, 4.0)]}) is None
    print_table(rows)
    told = capsys.readouterr().out
    assert "11.36 → 10.11" in told
    assert "output cut at 400 tokens of 10000" in told


def test_cpu_ranks_with_experts_are_measured(tmp_path: Path) -> None:
    tiny_glm(tmp_path)
    graphs: dict[int, list[tuple[float, float]]] = {}
    case = Case(str(tmp_path), 2, 2, [4], num_prompt=20, num_output=40, trace_steps=5, admit=False,
                lengths=[80], device="cpu")  # fmt: skip
    (row,) = measure(case, graphs)
    assert row["steps"] >= 20
    assert 4 < row["touched"] < 9
    assert row["total_s"] > 0
    assert row["tokens_per_s"] > 0


def test_ranks_that_stand_for_more(tmp_path: Path) -> None:
    """Two of four: their shards are those of four."""
    tiny_glm(tmp_path)
    case = Case(str(tmp_path), 4, 2, [3], num_prompt=20, num_output=40, trace_steps=5, admit=False,
                device="cpu", stand_ins=2)  # fmt: skip
    (row,) = measure(case, {})
    assert (row["ranks"], row["num_running"]) == (4, 2)
    assert row["steps"] >= 20
    assert told_ranks(row) == "4 (on 2)"


@pytest.mark.parametrize(
    ("ranks", "num_gpus", "is_wanted", "number", "reason"),
    [
        (2, 2, True, 0, ""),
        (4, 2, True, 2, ""),
        (4, 3, True, 2, ""),
        (8, 1, True, 1, ""),
        (4, 2, False, None, "TP 4 needs as many GPUs, and here are 2; with --stand-ins, any number would do"),
        (4, 0, True, None, "TP 4 needs as many GPUs, and here are 0"),
        (6, 2, True, None, "TP 6 needs as many GPUs, and here are 2 (--stand-ins is for TP 2, 4, 8)"),
    ],
)
def test_how_many_stand_in(
    ranks: int, num_gpus: int, is_wanted: bool, number: int | None, reason: str
) -> None:
    assert num_stand_ins(ranks, num_gpus, is_wanted) == number
    assert number is not None or why_not(ranks, num_gpus, is_wanted) == reason


def test_stand_ins_that_have_no_effect_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, options in ((gpu, ["--shapes", "qwen3-8b:2"]), (table, ["--tensor-parallel-size", "2"])):
        monkeypatch.setattr(module, "count_gpus", lambda: 2)
        parser = argparse.ArgumentParser()
        module.add_options(parser)
        assert module.run(parser.parse_args([*options, "--stand-ins"])) == 1
        assert "no effect" in capsys.readouterr().err


@needs_triton
def test_gpus_that_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without GPUs: rank 1 of 2 that stand for 4. That such addresses are right is shown by
    tests/rank/test_symmetric_kernels.py."""

    def connect(
        self: NcclCollectives, store_fd: int, rank: int, size: int, timeout: float, device: Any
    ) -> None:
        self.rank, self.size, self.device = rank, size, device

    def share(self: NcclCollectives, size: int) -> list[int]:
        shared.append(size)
        return [0x1000000, 0x2000000]

    def gather(out: torch.Tensor, x: torch.Tensor) -> None:
        out.copy_(torch.stack((x + 10, x)))

    shared: list[int] = []
    monkeypatch.setattr(NcclCollectives, "__init__", connect)
    monkeypatch.setattr(stand_ins.SymmetricStandIns, "_share_inboxes", share)
    monkeypatch.setattr(stand_ins, "all_gather_single", gather)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    ranks = stand_ins.SymmetricStandIns(-1, 1, 2, 1.0, torch.device("cpu"), 4)
    assert shared == [4], "inboxes have room for the whole group, and are made once"
    assert (ranks.rank, ranks.size, ranks.inboxes.rank, ranks.inboxes.size) == (1, 4, 1, 4)
    row = 2 * 8192 * 2  # bytes of two entries
    assert ranks.inboxes.rows == (0x1000000, 0x2000000, 0x1000000 + row, 0x2000000 + row)
    first, second = ranks.inboxes.pairs[:2]
    assert ranks.inboxes.pairs == (first, second, first + 16, second + 16)
    assert ranks.all_gather(torch.tensor([1, 2])).tolist() == [[11, 12], [1, 2]] * 2
    large = torch.empty(1, 4096, dtype=torch.bfloat16)
    assert [ranks._shots(num_rows, large) for num_rows in (1, 48, 49, 1024, 1025)] == [1, 1, 1, 1, 0]


def test_cpu_ranks_are_measured_alike_but_for_the_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    graphs: dict[int, list[tuple[float, float]]] = {}
    on = Case(str(tmp_path), 2, 1, [1, 3], num_prompt=20, num_output=40, trace_steps=20, admit=False,
              lengths=[50], device="cpu")  # fmt: skip
    rows = measure(on, graphs) + measure(replace(on, lookahead=0, replays=False), graphs)
    assert [(row["batch"], row["lookahead"]) for row in rows] == [(1, 1), (3, 1), (1, 0), (3, 0)]
    assert [len(points) for points in graphs.values()] == [9, 9], "graphs alone are timed once"
    assert graphs[3][-1][0] == pytest.approx(50, abs=10)
    for row in rows:
        assert row["steps"] >= 20
        assert 23 < row["length"] < 60
        assert row["tpot_ms"] > 0
        assert row["graph_ms"] > 0
        assert row["trace_failed"], "no GPU, no trace"
        assert ("spread_p99_us" in row) == (row["lookahead"] == 1), "single ones too"
    print_tables(rows)
    told = capsys.readouterr().out
    assert told.count("no trace: ") == 4
