"""What has been measured, in tables and in JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tpworker.bench.load import Measured
from tpworker.bench.plan import Plan
from tpworker.bench.summary import Spread, Summary
from tpworker.bench.target import Target
from tpworker.errors import printable
from tpworker.version import version


def what_is_asked(plan: Plan, target: Target) -> str:
    """A line or two on what all levels have in common."""
    endpoint = "chat" if plan.is_chat else "completions"
    if plan.dataset:
        prompts = f"{len(plan.dataset)} prompts of a file"
    else:
        kind = "token ids" if plan.token_ids else f"words of {plan.tokens_per_word:.2f} tokens"
        prompts = f"{plan.prompt_len} tokens in ({kind})"
        if plan.shared_prefix:
            prompts += f" behind {plan.shared_prefix} that all share"
    turns = f", conversations of {plan.turns} turns" if plan.turns > 1 else ""
    eos = "" if plan.ignore_eos else " at most"
    asked = f"{prompts}, {plan.output_len} out{eos}{turns}; seed {plan.seed}"
    return f"{printable(target.model)}, {endpoint}: {asked}"


def show(summary: Summary, console: Console) -> None:
    """A level: how much, how soon, and what went wrong."""
    client = summary.client
    console.print()
    console.print(f"[bold]{summary.load}[/]: {summary.num_requests} requests in {summary.seconds:.1f} s")
    requests, tokens = summary.requests_per_second, summary.output_per_second
    rates = [f"{requests:.2f} requests/s", f"{tokens:,.0f} output tokens/s"]
    if summary.num_prompt:
        rates.append(f"{summary.tokens_per_second:,.0f} tokens/s in all")
    if summary.good_per_second is not None:
        rates.append(f"goodput {summary.good_per_second:.2f} requests/s ({summary.num_good} met the goals)")
    console.print("  " + ", ".join(rates))
    if summary.num_done:
        console.print(f"  {_tokens(summary)}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("  ms", "mean", "p50", "p90", "p99"):
        table.add_column(title, justify="left" if title == "  ms" else "right")
    for name, spread in _spreads(summary).items():
        if spread is not None:
            values = (spread.mean, spread.p50, spread.p90, spread.p99)
            table.add_row(f"  {name}", *(f"{1e3 * value:,.2f}" for value in values))
    if table.row_count:
        console.print(table)
    for kind, count in sorted(summary.errors.items(), key=lambda item: -item[1]):
        console.print(f"  [red]{count} failed[/]: {escape(kind)}")
    console.print(
        f"  client: {client.num_processes} process{'es' * (client.num_processes > 1)}, {client.cpu:.0%} of "
        f"a core, event loop late by {1e3 * client.lag_p50:.1f} ms (p50), {1e3 * client.lag_p99:.1f} ms (p99)"
    )
    if trouble := client.trouble(summary.tpot):
        console.print(f"  [yellow]{trouble}[/]")


def _spreads(summary: Summary) -> dict[str, Spread | None]:
    return {"TTFT": summary.ttft, "TPOT": summary.tpot, "ITL": summary.itl, "E2E": summary.e2e}


def _tokens(summary: Summary) -> str:
    done = summary.num_done
    told = f"on average {summary.num_prompt / done:,.1f} tokens in"
    if summary.num_cached:
        told += f" ({summary.num_cached / max(1, summary.num_prompt):.0%} from the prefix cache)"
    told += f", {summary.num_output / done:,.1f} out"
    if not summary.is_counted:
        told += " (pieces: the server does not count tokens)"
    elif summary.num_short:
        told += f"; {summary.num_short} outputs ended early (--ignore-eos has them go on)"
    return told


def compare(summaries: Sequence[Summary], console: Console) -> None:
    """All levels, a line each."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True,
        title="TTFT and TPOT in ms", title_justify="left",
    )  # fmt: skip
    titles = ["load", "req/s", "out/s", "TTFT p50", "p99", "TPOT p50", "p99", "failed"]
    if any(summary.num_good is not None for summary in summaries):
        titles.append("goodput")
    for title in titles:
        table.add_column(title, justify="left" if title == "load" else "right", no_wrap=True)
    for one in summaries:
        cells = [one.load, f"{one.requests_per_second:.2f}", f"{one.output_per_second:,.0f}"]
        for spread in (one.ttft, one.tpot):
            cells += ["–", "–"] if spread is None else [f"{1e3 * x:,.1f}" for x in (spread.p50, spread.p99)]
        cells.append(str(one.num_failed))
        if one.good_per_second is not None:
            cells.append(f"{one.good_per_second:.2f}")
        table.add_row(*cells)
    console.print()
    console.print(table)


def to_json(
    url: str, target: Target, plan: Plan, results: Sequence[tuple[Summary, Sequence[Measured]]]
) -> dict[str, Any]:
    """All of it, with each request but the times of its pieces."""
    said = plan.to_json()
    said["dataset"] = len(plan.dataset)
    return {
        "tpworker": version(),
        "url": url,
        "target": dataclasses.asdict(target),
        "plan": said,
        "levels": [
            {
                **dataclasses.asdict(summary),
                "requests_per_second": summary.requests_per_second,
                "output_per_second": summary.output_per_second,
                "tokens_per_second": summary.tokens_per_second,
                "good_per_second": summary.good_per_second,
                "client_trouble": summary.client.trouble(summary.tpot),
                "requests": [
                    {name: value for name, value in record.to_json().items() if name != "intervals"}
                    for one in measured
                    for record in one.records
                ],
            }
            for summary, measured in results
        ],
    }
