"""The command line of `tpworker bench`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tpworker.cli.arguments import integer, json_object, number
from tpworker.cli.server_options import add_key_options, find_api_key
from tpworker.errors import ConfigError, shown

if TYPE_CHECKING:
    from tpworker.bench.bench import BenchOptions

_MOST = 1_000_000
_WHAT = (
    "Measure how fast a server answers: any that speaks OpenAI's API. TTFT is the time to the first token, "
    "TPOT the mean time between two tokens of a request behind it, ITL the time between two pieces of its "
    "stream, E2E the time to its end. Requests that fail are counted by kind."
)


def add_bench(commands: Any) -> None:
    """Adds the command.

    Args:
        commands: argparse's subparsers.
    """
    parser = commands.add_parser(
        "bench",
        usage="tpworker bench URL [OPTION …]",
        help="measure how fast a server answers: any that speaks OpenAI's API",
        description=_WHAT,
        allow_abbrev=False,
    )
    parser.add_argument("url", metavar="URL", help="as http://127.0.0.1:8000, with or without /v1")
    _add_load(parser.add_argument_group("load"))
    _add_prompts(parser.add_argument_group("what is asked"))
    _add_server(parser.add_argument_group("server and client"))
    _add_results(parser.add_argument_group("results"))


def _add_load(group: Any) -> None:
    group.add_argument(
        "--concurrency",
        nargs="+",
        type=integer,
        metavar="N",
        help="requests at a time, a level each (default: 1 16 64, unless there is only --rate without %%)",
    )
    group.add_argument(
        "--rate",
        nargs="+",
        metavar="R",
        help="requests a second, whatever becomes of them, as chance has it (Poisson), a level each; as "
        "80%%: that share of the most requests a second that a level of --concurrency has brought",
    )
    group.add_argument(
        "--num-requests",
        type=integer,
        metavar="N",
        help="of each level (default: 4 times its concurrency, or of 30 seconds; at least 32)",
    )
    group.add_argument(
        "--seconds", type=number, metavar="S", help="send new requests for so long, in each level, instead"
    )
    group.add_argument(
        "--warmup",
        type=integer,
        default=8,
        metavar="N",
        help="requests before all, which do not count (default: 8)",
    )


def _add_prompts(group: Any) -> None:
    lengths = "tokens, as 1024, 512-2048 or 1024~10%%"
    group.add_argument(
        "--prompt-len", default="512", metavar="N", help=f"of a prompt: {lengths} (default: 512)"
    )
    group.add_argument(
        "--output-len", default="128", metavar="N", help=f"of an output, at most: {lengths} (default: 128)"
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="outputs have that length: for servers that know ignore_eos"
    )
    group.add_argument(
        "--shared-prefix",
        type=integer,
        default=0,
        metavar="N",
        help="tokens more, before all prompts, the same for all",
    )
    group.add_argument(
        "--turns",
        type=integer,
        default=1,
        metavar="N",
        help="requests of a conversation, each with --prompt-len new tokens behind all that was said before; "
        "for --endpoint chat. --concurrency counts conversations, --num-requests requests",
    )
    group.add_argument(
        "--dataset",
        metavar="FILE",
        help='prompts from a file, a line each, in JSON: a text, {"prompt": …} or {"messages": […]}, '
        "perhaps with max_tokens",
    )
    group.add_argument(
        "--endpoint", choices=["completions", "chat"], default="completions", help="default: completions"
    )
    group.add_argument(
        "--text", action="store_true", help="prompts are text, also where the server takes token ids"
    )
    group.add_argument(
        "--temperature", type=number, default=0.0, metavar="T", help="of sampling (default: 0)"
    )
    group.add_argument(
        "--extra-body", type=json_object, metavar="JSON", help="further fields of each request, as an object"
    )
    group.add_argument(
        "--seed",
        type=integer,
        metavar="N",
        help="of what is asked and when (default: another in each run, as a server may remember prompts)",
    )


def _add_server(group: Any) -> None:
    group.add_argument("--model", metavar="NAME", help="default: the first that the server names")
    add_key_options(group, "what the server wants to be sent")
    group.add_argument(
        "--timeout", type=number, default=600.0, metavar="S", help="of a request, seconds (default: 600)"
    )
    group.add_argument(
        "--processes",
        type=integer,
        default=1,
        metavar="N",
        help="of the client, which says when it needs more (default: 1)",
    )


def _add_results(group: Any) -> None:
    group.add_argument(
        "--slo-ttft",
        type=number,
        metavar="MS",
        help="a request is good if its TTFT is at most that; and goodput is told: good requests a second",
    )
    group.add_argument("--slo-tpot", type=number, metavar="MS", help="the same of its TPOT")
    group.add_argument("--json", metavar="FILE", help="write what was measured, each request included")
    group.add_argument("--plot", metavar="FILE", help="draw it to FILE (PNG, SVG …; needs matplotlib)")


def bench_options(given: dict[str, Any]) -> BenchOptions:
    """What was given, checked.

    Raises:
        ConfigError: a value is out of range, or an option has no effect beside the others.
    """
    from tpworker.bench.bench import BenchOptions
    from tpworker.bench.connection import Address
    from tpworker.bench.lengths import Lengths
    from tpworker.bench.summary import Goals

    Address.of(given["url"])
    _check_ranges(given)
    _check_effects(given)
    rates, shares = _rates(given["rate"] or ())
    concurrency = given["concurrency"] or (() if rates and not shares else (1, 16, 64))
    return BenchOptions(
        url=given["url"],
        concurrency=tuple(concurrency),
        rates=rates,
        shares=shares,
        num_requests=given["num_requests"],
        seconds=given["seconds"],
        prompt_len=Lengths.parse(given["prompt_len"], "--prompt-len"),
        output_len=Lengths.parse(given["output_len"], "--output-len"),
        shared_prefix=given["shared_prefix"],
        turns=given["turns"],
        dataset=given["dataset"],
        is_chat=given["endpoint"] == "chat",
        as_text=given["text"],
        ignore_eos=given["ignore_eos"],
        temperature=given["temperature"],
        seed=given["seed"],
        warm_up=given["warmup"],
        model=given["model"],
        extra=_extra(given["extra_body"]),
        api_key=find_api_key(given["api_key"], given["api_key_file"], os.environ),
        timeout=given["timeout"],
        processes=given["processes"],
        goals=Goals(_seconds(given["slo_ttft"]), _seconds(given["slo_tpot"])),
        json_file=_writable(given["json"], "--json"),
        picture=_writable(given["plot"], "--plot"),
    )


_RANGES = {
    "num_requests": (1, _MOST), "seconds": (0.1, 86400), "warmup": (0, 10_000), "shared_prefix": (0, _MOST),
    "turns": (1, 1000), "temperature": (0, 100), "timeout": (0.1, 86400), "processes": (1, 64),
    "slo_ttft": (0.001, 1e9), "slo_tpot": (0.001, 1e9), "seed": (0, 2**63 - 1),
}  # fmt: skip


def _check_ranges(given: dict[str, Any]) -> None:
    for name, (low, high) in _RANGES.items():
        if given[name] is not None and not low <= given[name] <= high:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} {shown(given[name])}: must be from {low:g} to {high:g}")
    for value in given["concurrency"] or ():
        if not 1 <= value <= 65536:
            raise ConfigError(f"--concurrency {value}: must be from 1 to 65536")


def _check_effects(given: dict[str, Any]) -> None:
    if given["turns"] > 1 and given["endpoint"] != "chat":
        raise ConfigError("--turns is for conversations: --endpoint chat")
    if given["text"] and given["endpoint"] == "chat":
        raise ConfigError("--text has no effect with --endpoint chat, whose prompts are text: leave it out")
    if given["num_requests"] is not None and given["seconds"] is not None:
        raise ConfigError("--num-requests and --seconds are both given: leave out one")
    if given["dataset"] is not None:
        for name, default in (("prompt_len", "512"), ("shared_prefix", 0), ("turns", 1), ("text", False)):
            if given[name] != default:
                raise ConfigError(f"--{name.replace('_', '-')} has no effect with --dataset: leave it out")


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _rates(texts: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    rates, shares = [], []
    for text in texts:
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            value = 0.0
        if not 0 < value <= _MOST:
            raise ConfigError(f"--rate {shown(text)}: must be requests a second, above 0, or a share, as 80%")
        if text.endswith("%"):
            shares.append(value / 100)
        else:
            rates.append(value)
    return tuple(rates), tuple(shares)


def _extra(given: dict[str, Any] | None) -> dict[str, Any]:
    extra = given or {}
    for name in ("stream", "stream_options", "n"):
        if name in extra:
            raise ConfigError(f"--extra-body: {name} is the benchmark's own")
    return extra


def _writable(file: str | None, flag: str) -> str | None:
    if file is not None:
        folder = os.path.dirname(os.path.abspath(file))
        if not os.access(folder, os.W_OK) or os.path.isdir(file):
            raise ConfigError(f"{flag} {shown(file)} cannot be written")
    return file
