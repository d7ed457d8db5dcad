"""`python -m benchmarks NAME [options]`, or scripts/bench NAME [options]: runs one benchmark.

A benchmark is a module in a folder here with `add_options(parser)` and `run(options) -> int`; it is imported
when it is asked for. Each prints a table, and with --json writes what it measured. What they share: common/.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from benchmarks.common.options import new_file

BENCHMARKS = {
    "gpu": ("steps.gpu", "decode steps on GPUs, beside their graphs alone"),
    "table": ("steps.table", "GLM-4.5-Air and ERNIE-4.5-21B-A3B on GPUs, overlap off and on"),
    "drafts": ("steps.drafts", "decode steps with drafts on GPUs, right as often as is asked for"),
    "barrier": ("collectives.barrier", "the admission barrier, beside gloo's"),
    "collectives": ("collectives.collectives", "what GPUs do together: sums, choices, barriers"),
    "kernels": (
        "steps.kernels",
        "a decode step on a GPU, kernel by kernel, beside the peer and the bytes it must read",
    ),
    "fill": (
        "steps.fill",
        "simulated clients and step times: how steps are filled, and what clients see of it",
    ),
    "prompts": ("steps.prompts", "steps of prompts on a GPU, kernel by kernel, beside their operations"),
    "moe": (
        "steps.moe",
        "a mixture of experts on a GPU, beside the bytes it must read and torch's grouped products",
    ),
    "host": ("host.host", "what a step costs the host, with a fake device"),
    "hosts": ("hosts.hosts", "what two hosts would cost a step: plans and barriers between namespaces"),
    "http": ("host.http", "what a token costs from the scheduler to a client's socket, with a fake device"),
    "metrics": ("host.metrics", "what metrics cost: a token, a step, a scrape"),
    "serve": ("serving.serve", "a real model over HTTP, overlap off and on"),
    "rows": ("serving.rows", "kinds of load against any OpenAI-compatible server, or two servers compared"),
    "schemas": ("serving.schemas", "outputs held to JSON schemas: whether all validate, and what that costs"),
    "chaos": (
        "chaos.chaos",
        "no speed: processes are lost under load, and no request may be (scripts/chaos)",
    ),
    "recovery": ("chaos.recovery", "how long clients wait when a process is lost"),
    "acceptance": ("speculation.acceptance", "how many tokens a step drafts bring with a real model"),
    "distill": ("speculation.distill", "trains a head for multi-token prediction on a model's own outputs"),
}
"""By name, its module and what it measures."""


def main(arguments: list[str]) -> int:
    """Runs the benchmark that `arguments` begin with; the rest are its options."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures tpworker on this machine.",
        epilog="Options of one benchmark: scripts/bench NAME --help. "
        + " ".join(f"{name}: {what}." for name, (_, what) in BENCHMARKS.items()),
    )
    parser.add_argument("name", choices=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    name = parser.parse_args(arguments[:1]).name
    benchmark = importlib.import_module(f"benchmarks.{BENCHMARKS[name][0]}")
    options = argparse.ArgumentParser(prog=f"scripts/bench {name}", description=benchmark.__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    options.add_argument("--json", metavar="FILE", type=new_file, help="write what was measured to FILE")
    benchmark.add_options(options)
    status: int = benchmark.run(options.parse_args(arguments[1:]))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
