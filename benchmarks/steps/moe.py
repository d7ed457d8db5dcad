"""What one mixture of experts costs a GPU: routing, and the experts of decode batches and of prefill chunks.

Random weights, in bfloat16 or in FP8, and random inputs, which the router sends to all experts alike; nothing
is summed over ranks. The floor is the time that the weights of those experts that some token goes to need at
4.3 TB/s.
Every figure is of one captured graph that holds several layers, with weights and inputs of their own, so that
the L2 cache holds nothing of the next one. The columns:

  touched   experts that some token goes to, shared ones included; the mean of the graph's layers
  route     the router alone
  experts   the experts alone, with those choices
  layer     both, and its ratio to the floor
  library   the same from parts that torch has, grouped_mm for the products; of weights in bfloat16 only
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common.floors import BYTES_PER_SECOND
from benchmarks.common.options import positive
from benchmarks.common.quantized import add_quantization, quantized
from benchmarks.common.report import machine, save
from benchmarks.steps.kernels import CONFIGS, replay_ms
from tpworker.kernels import cuda_operations
from tpworker.kernels.moe_plans import Weights
from tpworker.kernels.operands import Fp8Weight
from tpworker.model import moe
from tpworker.model.families import MoeSpec, Quantization, read_spec
from tpworker.model.tp import Shard

_CYCLE_BYTES = 1 << 30  # of weights that a graph reads, at least: many times the L2 cache
_SETS = 4  # of weights; a graph with more layers uses them in turn


def add_options(parser: argparse.ArgumentParser) -> None:
    models = ["glm-4.5-air", "ernie-4.5-21b-a3b"]
    parser.add_argument("--models", nargs="+", default=models, help="folders of configs/")
    parser.add_argument("--tp", type=positive, nargs="+", default=[4, 8, 2, 1], help="one rank is measured")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1, 4, 16, 64, 256, 575, 2048])
    add_quantization(parser)
    parser.add_argument("--rounds", type=positive, default=5, help="of 20 replays each; the median is told")


def run(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("a GPU is needed, and there is none here", file=sys.stderr)
        return 1
    data: dict[str, Any] = {"machine": machine() | {"gpu": torch.cuda.get_device_name()}, "rows": []}
    console = Console(width=120)
    torch.manual_seed(0)
    with torch.inference_mode():
        for name, size in itertools.product(options.models, options.tp):
            layers = Layers.random(name, size, options.quantization)
            rows = []
            for count in options.tokens:
                rows.append(measure(layers, count, options.rounds))
                print(rows[-1], flush=True)
            print_table(rows, console)
            data["rows"] += [{"model": name, "tp": size} | row for row in rows]
            save(options.json, data)  # what there is, should the rest fail
            del layers
            torch.cuda.empty_cache()
    return 0


@dataclass(frozen=True)
class Layers:
    """Some layers of one model, as one rank holds them."""

    title: str
    spec: MoeSpec
    gates: list[Tensor]  # [E, D]
    bias: Tensor | None  # float32 [E]
    gate_ups: list[Weights]  # [E + S, 2 F, D]
    downs: list[Weights]  # [E + S, D, F]

    @classmethod
    def random(cls, name: str, size: int, quantization: str | None = None) -> Layers:
        """Of a model in configs/, at this TP."""
        model = quantized(read_spec(CONFIGS / name), quantization)
        spec, expert = model.moe, Shard.of(model, 0, size).expert
        assert spec is not None
        assert expert is not None
        hidden, width, stacked = model.hidden_size, expert.local, spec.num_experts + spec.num_shared
        gate_dtype = torch.float32 if spec.float32_gate else torch.bfloat16

        def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda").normal_(0, shape[-1] ** -0.5)

        def stack(*shape: int) -> Weights:
            return normal(*shape) if model.quantization is None else _random_fp8(shape, model.quantization)

        return cls(
            title=f"{name}, TP {size}: D {hidden}, {spec.num_experts} + {spec.num_shared} experts, F {width}",
            spec=spec,
            gates=[normal(spec.num_experts, hidden, dtype=gate_dtype) for _ in range(_SETS)],
            bias=torch.zeros(spec.num_experts, device="cuda") if spec.has_bias else None,
            gate_ups=[stack(stacked, 2 * width, hidden) for _ in range(_SETS)],
            downs=[stack(stacked, hidden, width) for _ in range(_SETS)],
        )

    @property
    def expert_bytes(self) -> int:
        """Of the weights of one expert."""
        return sum(_tensor(stacks[0])[0].nbytes for stacks in (self.gate_ups, self.downs))

    def inputs(self, count: int) -> list[Tensor]:
        """[T, D] each, for so many layers that their weights do not stay in the L2 cache."""
        likely = min(count * self.spec.experts_per_token, self.spec.num_experts) * self.expert_bytes
        num_layers = max(_SETS, -(-_CYCLE_BYTES // likely))
        hidden = self.gates[0].shape[1]
        return [torch.randn(count, hidden, device="cuda").bfloat16() for _ in range(num_layers)]

    def with_weights(self, inputs: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Weights, Weights]]:
        """Each input with gate, gate_up and down of its layer."""
        layers = itertools.cycle(zip(self.gates, self.gate_ups, self.downs, strict=True))
        return ((x, *layer) for x, layer in zip(inputs, layers, strict=False))


def _tensor(weight: Weights) -> Tensor:
    return weight.values if isinstance(weight, Fp8Weight) else weight


def _random_fp8(shape: tuple[int, ...], quantization: Quantization) -> Fp8Weight:
    """A weight [n, out, in] of any values but NaN, about as large as those in bfloat16."""
    number, size_out, size_in = shape
    rows, columns = (quantization.block,) * 2 if quantization.block else (1, size_in)
    bits = torch.randint(0, 127, shape, dtype=torch.uint8, device="cuda")
    bits |= torch.randint(0, 2, shape, dtype=torch.uint8, device="cuda") << 7
    scales = torch.full((number, -(-size_out // rows), -(-size_in // columns)), 0.01, device="cuda")
    scales *= size_in**-0.5
    return Fp8Weight(bits.view(torch.float8_e4m3fn), scales, (rows, columns), torch.bfloat16)


def measure(layers: Layers, count: int, rounds: int) -> dict[str, Any]:
    """One row: a number of tokens."""
    from tpworker.kernels import moe_kernels, moe_routing  # they import Triton

    spec, bias = layers.spec, layers.bias
    inputs = layers.inputs(count)
    choices = [moe_routing.route(x, gate, bias, spec) for x, gate, _, _ in layers.with_weights(inputs)]
    touched = fmean(len(ids.unique()) for ids, _ in choices)

    def route() -> list[tuple[Tensor, Tensor]]:
        return [moe_routing.route(x, gate, bias, spec) for x, gate, _, _ in layers.with_weights(inputs)]

    def experts() -> list[Tensor]:
        return [
            moe_kernels.experts(x, *choice, gate_up, down)
            for (x, _, gate_up, down), choice in zip(layers.with_weights(inputs), choices, strict=True)
        ]

    def layer() -> list[Tensor]:
        return [
            moe_kernels.experts(x, *moe_routing.route(x, gate, bias, spec), gate_up, down)
            for x, gate, gate_up, down in layers.with_weights(inputs)
        ]

    def library() -> list[Tensor]:
        return [
            library_layer(x, gate, bias, spec, _tensor(gate_up), _tensor(down))
            for x, gate, gate_up, down in layers.with_weights(inputs)
        ]

    def microseconds(work: Callable[[], Any]) -> float:
        return 1000 * replay_ms(work, rounds)[0] / len(inputs)

    floor = 1e6 * touched * layers.expert_bytes / BYTES_PER_SECOND
    row: dict[str, Any] = {"title": layers.title, "tokens": count, "touched": touched, "floor_us": floor}
    row |= {f"{work.__name__}_us": microseconds(work) for work in (route, experts, layer)}
    row |= {"ratio": row["layer_us"] / floor}
    if isinstance(layers.downs[0], Fp8Weight):
        return row
    row |= {"library_us": microseconds(library)}
    return row | {"library_ratio": row["library_us"] / floor}


def library_layer(
    x: Tensor, gate: Tensor, bias: Tensor | None, spec: MoeSpec, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The layer from parts that torch has, without a host synchronisation: what the kernels have to beat."""
    ids, weights = moe.route(x, gate, bias, spec)
    width = ids.shape[1]
    by_expert, order = ids.flatten().sort(stable=True)
    all_ids = torch.arange(len(down), device=x.device, dtype=torch.int32)
    ends = torch.searchsorted(by_expert, all_ids, right=True, out_int32=True)
    rows = x.index_select(0, order // width)
    act = cuda_operations.silu_mul(F.grouped_mm(rows, gate_up.mT, offs=ends))
    parts = torch.empty_like(rows).index_copy_(0, order, F.grouped_mm(act, down.mT, offs=ends))
    return torch.einsum("tkd,tk->td", parts.view(*ids.shape, -1).float(), weights).to(x.dtype)


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    """The rows of one model at one TP."""
    table = Table(title=f"{rows[0]['title']}; µs")
    columns = (
        "touched",
        "floor_us",
        "route_us",
        "experts_us",
        "layer_us",
        "ratio",
        "library_us",
        "library_ratio",
    )
    present = [column for column in columns if column in rows[0]]
    for column in ("tokens", *present):
        table.add_column(column.removesuffix("_us").replace("_", " "), justify="right")
    for row in rows:
        cells = (f"{row[column]:.{2 if 'ratio' in column else 1}f}" for column in present)
        table.add_row(str(row["tokens"]), *cells)
    console.print(table)
