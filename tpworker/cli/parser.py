"""The options and their help, for argparse."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from tpworker.cli.arguments import CommandParser, ShowVersion, integer, json_object, number
from tpworker.cli.bench import add_bench
from tpworker.cli.log_options import add_log_options
from tpworker.cli.rank_options import add_rank
from tpworker.cli.server_options import add_key_options, add_web_options
from tpworker.cli.top import add_top
from tpworker.cli.trace_options import add_trace_options
from tpworker.config import MAX_PROMPT_LOOKUP, MAX_SPECULATIVE_TOKENS, RuntimeConfig
from tpworker.parsing import REASONING_FORMATS, TOOL_FORMATS

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000


def make_parser(source: str = "") -> tuple[argparse.ArgumentParser, dict[str, dict[str, bool]]]:
    """The parser of `tpworker`, and of each command the options, and whether they take a value.

    Options that are not given are missing in what the parser returns.

    Args:
        source: stands before what is said to be wrong.
    """
    parser = CommandParser(
        prog="tpworker", description="A tensor-parallel runtime for LLM serving.", allow_abbrev=False
    )
    parser.add_argument(
        "--version",
        action=ShowVersion,
        nargs=0,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        help="print the version and exit",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model through an OpenAI-compatible HTTP API",
        usage="tpworker serve [MODEL] [OPTION …]",
        description="Serve a model through an OpenAI-compatible HTTP API; without options the default model. "
        "MODEL, which comes first, is the same as --model MODEL.",
        argument_default=argparse.SUPPRESS,  # so that what was given can be told from what was not
        allow_abbrev=False,
    )
    serve.source = source
    serve.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file with options by their names, as `port: 8000`; what is given here counts more",
    )
    _add_model_options(serve.add_argument_group("model"))
    _add_schedule_options(serve.add_argument_group("schedule and memory"))
    _add_speculation_options(serve.add_argument_group("speculation"))
    _add_fault_options(serve.add_argument_group("faults"))
    _add_server_options(serve.add_argument_group("server"))
    add_log_options(serve.add_argument_group("log"))
    add_trace_options(serve.add_argument_group("traces"))
    doctor = commands.add_parser(
        "doctor",
        usage="tpworker doctor [MODEL] [OPTION …]",
        help="say what a TP group would find on this machine, and what is missing for one",
        description="Say what a TP group would find on this machine, and what is missing for one. Starts "
        "nothing and fetches nothing. The exit status is 0 if the group would start, 1 if not, and 2 for a "
        "mistake in the options.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_doctor_options(doctor)
    add_top(commands)
    add_bench(commands)
    add_rank(commands)
    flags = {
        command: {flag: action.nargs != 0 for action in one._actions for flag in action.option_strings}
        for command, one in (("serve", serve), ("doctor", doctor))
    }
    return parser, flags


def flag_of(name: str) -> str:
    """The flag of what the parser calls `name`, if that is not the same."""
    return {"force_include_usage": "--enable-force-include-usage"}.get(name, f"--{name.replace('_', '-')}")


_Group = Any  # argparse's groups have no public type
_COUNT: dict[str, Any] = {"type": integer, "metavar": "N"}
_SECONDS: dict[str, Any] = {"type": number, "metavar": "SECONDS"}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(RuntimeConfig)}


def _add(group: _Group, flag: str, text: str, *aliases: str, **options: Any) -> None:
    """An option of RuntimeConfig; its help ends with the default there, unless the text tells of it."""
    default = _DEFAULTS[options.get("dest") or flag.removeprefix("--").replace("-", "_")]
    told = (
        "" if default is None or isinstance(default, bool) or "default" in text else f" (default: {default})"
    )
    group.add_argument(flag, *aliases, help=text + told, **options)


def _add_model_options(group: _Group) -> None:
    _add_model(
        group,
        "a folder with config.json, *.safetensors and tokenizer.json (or tokenizer.model), or a hub name "
        "(org/name); default: SmolLM2-135M-Instruct",
    )
    _add_ranks(group)
    _add_join_address(group)
    _add_dtypes(group)
    _add_max_model_len(group)
    _add(
        group,
        "--load-format",
        "dummy: random weights of the right shapes, for benchmarks",
        choices=["auto", "dummy"],
    )
    _add(
        group,
        "--chat-template",
        "a file with a chat template (Jinja), which takes the place of the model's own",
        metavar="FILE",
    )
    _add(group, "--seed", "of dummy weights, and of requests that give none", **_COUNT)


def _add_model(group: _Group, text: str) -> None:
    _add(group, "--model", text)


def _add_ranks(group: _Group) -> None:
    _add(
        group,
        "--tensor-parallel-size",
        "number of TP ranks, a process each, and on GPUs a GPU each (default: 1 if there is a GPU, else 2)",
        "-tp",
        **_COUNT,
    )
    _add(
        group,
        "--device",
        "what the ranks run on; auto: GPUs, where there is one for each rank, else the CPU. A rank on a GPU "
        "keeps to the CPUs near that GPU, of those that it may use (taskset, the container)",
        choices=["auto", "cpu", "cuda"],
    )


def _add_join_address(group: _Group) -> None:
    _add(
        group,
        "--join-address",
        "start no ranks, but wait for those that somebody else starts on this machine (torchrun, Slurm, a "
        "Ray placement group), each a `tpworker rank` with this name (default: ranks are started here)",
        metavar="NAME",
    )


def _add_dtypes(group: _Group) -> None:
    _add(
        group,
        "--dtype",
        "of weights, activations and KV cache; auto: the checkpoint's",
        choices=["auto", "float32", "bfloat16", "float16"],
    )

    _add(
        group,
        "--quantization",
        "bring weights to FP8 (E4M3) as they are read, if the checkpoint's are not; norms, embeddings and "
        "output head stay as they are (default: as the checkpoint has them)",
        choices=["fp8"],
    )


def _add_max_model_len(group: _Group) -> None:
    _add(
        group,
        "--max-model-len",
        "most tokens of one request, prompt and output together (default: what the model's config says)",
        **_COUNT,
    )


def _add_doctor_options(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "a folder, or a name on the hub that is in its cache: look whether it fits")
    _add_ranks(parser)
    _add_dtypes(parser)
    _add_max_model_len(parser)
    _add(parser, "--load-format", "dummy: the weights' files need not be there", choices=["auto", "dummy"])
    _add_memory_options(parser)
    _add_method(parser)
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def _add_memory_options(group: _Group) -> None:
    _add(
        group,
        "--max-num-seqs",
        "most requests that run at once (default: 256 on GPUs, 64 on the CPU)",
        **_COUNT,
    )
    _add(
        group,
        "--max-num-batched-tokens",
        "most tokens of one step: one for each request that decodes, the rest for prompts (default: chosen "
        "step by step, up to 8192 on GPUs and 512 on the CPU)",
        **_COUNT,
    )
    _add(group, "--block-size", "tokens in one KV block, a power of two", **_COUNT)
    _add(
        group,
        "--kv-cache-dtype",
        "fp8: round keys and values to FP8 (E4M3) as they are stored, for twice as many tokens in the same "
        "memory; auto: as --dtype",
        choices=["auto", "fp8"],
    )
    _add(
        group,
        "--gpu-memory-utilization",
        "share of what is free beside the weights for KV blocks; on the CPU, of a rank's part of half of it",
        type=number,
        metavar="SHARE",
    )


def _add_schedule_options(group: _Group) -> None:
    _add_memory_options(group)
    group.add_argument(
        "--enable-overlap-schedule",
        action=argparse.BooleanOptionalAction,
        help="launch the next steps while one computes (default: on); --no-… is --lookahead 0",
    )
    _add(group, "--lookahead", "steps launched beyond the oldest one that is not answered", **_COUNT)
    _add(
        group,
        "--no-prefix-caching",
        "do not share the KV blocks of equal prefixes between requests",
        dest="prefix_caching",
        action="store_false",
    )
    _add(
        group,
        "--kv-events-config",
        "tell of what the prefix cache holds over ZeroMQ, as vLLM does, for routers that know prefixes: "
        '{"enable_kv_cache_events": true, "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}; it '
        "tells all token ids to whoever connects",
        type=json_object,
        metavar="JSON",
    )
    _add(
        group,
        "--scheduling-policy",
        "fcfs: first come, first served; priority: by the priority that a request brings, lower is earlier",
        choices=["fcfs", "priority"],
    )
    _add(
        group,
        "--max-queue",
        "most requests that wait for a slot, those still being tokenised included; each prompt of a request "
        "counts, and each choice; one more is refused with status 429",
        **_COUNT,
    )


def _add_fault_options(group: _Group) -> None:
    """Of what is a fault, and how many may be."""
    _add(
        group,
        "--target-itl",
        "seconds between two tokens that steps with prompts keep to, in chunks that are so small (default: "
        "0.035, or three steps without prompts)",
        **_SECONDS,
    )
    _add(
        group,
        "--target-ttft",
        "seconds to the first token: if all that waits would take longer in small chunks, steps are as large "
        "as they may be (default: 0.4)",
        **_SECONDS,
    )
    _add(
        group,
        "--step-timeout",
        "seconds after which a step that is not answered, or a process that does not join it, is a fault "
        "(default: chosen from what steps take, 5 to 60 on the CPU, 4 to 60 on GPUs)",
        **_SECONDS,
    )
    _add(group, "--start-timeout", "seconds within which all ranks must have loaded the model", **_SECONDS)
    _add(
        group,
        "--max-restarts",
        "a process that dies, hangs or raises has all of them started anew, and open requests go on; after "
        "more restarts than these within --restart-window the server ends with status 1. 0: at the first "
        "fault",
        **_COUNT,
    )
    _add(group, "--restart-window", "seconds within which restarts are counted", **_SECONDS)


def _add_method(group: _Group) -> None:
    _add(
        group,
        "--speculative-method",
        "guess tokens, and check several in one step: ngram, what followed when the last few tokens stood in "
        "the prompt or the output before, with any model; mtp, by the model's own next-token layer (default: "
        "none)",
        choices=["ngram", "mtp"],
    )


def _add_speculation_options(group: _Group) -> None:
    _add_method(group)
    _add(
        group,
        "--num-speculative-tokens",
        f"most drafts of one request in a step, up to {MAX_SPECULATIVE_TOKENS}; how many there are is chosen "
        "by what they cost and how many are right (default: 4 with ngram, 1 with mtp)",
        **_COUNT,
    )
    for flag, which, default in (("--prompt-lookup-max", "most", 4), ("--prompt-lookup-min", "fewest", 1)):
        text = (
            f"with ngram: {which} tokens that are looked up, up to {MAX_PROMPT_LOOKUP} (default: {default})"
        )
        _add(group, flag, text, **_COUNT)
    group.add_argument(
        "--speculative-config",
        metavar="JSON",
        help='the same in one, as {"method": "ngram", "num_speculative_tokens": 4}',
    )


def _add_server_options(group: _Group) -> None:
    group.add_argument(
        "--host",
        help=f"address to listen on; 0.0.0.0: on all of this machine's (default: {DEFAULT_HOST})",
    )
    group.add_argument(
        "--port",
        **_COUNT,
        help=f"port to listen on; 0: any that is free (default: {DEFAULT_PORT})",
    )
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="what clients may call the model, one or several names, of which the first is in answers "
        "(default: its hub name, or the name of its folder)",
    )
    add_key_options(group, "what clients must send as 'Authorization: Bearer KEY' (default: nothing)")
    add_web_options(group)
    group.add_argument(
        "--shutdown-timeout",
        **_SECONDS,
        help="how long open requests may take after the first signal to end (default: 20)",
    )
    group.add_argument(
        "--enable-force-include-usage",
        dest="force_include_usage",
        action="store_true",
        help="streams end with the token counts, also where stream_options does not ask for them",
    )
    group.add_argument(
        "--enable-sleep-mode",
        action="store_true",
        help="clients may put the server to sleep, and wake it up (POST /sleep, /wake_up): for all of them",
    )
    group.add_argument(
        "--enable-weight-updates",
        action="store_true",
        help="clients may have it serve other weights of the model, from a folder on this machine (POST "
        "/update_weights_from_disk)",
    )
    _add_formats(group)
    group.add_argument(
        "--ask", metavar="TEXT", help="answer this one question, greedily, on stdout, and exit: no server"
    )


def _add_formats(group: _Group) -> None:
    """Of what a model's output says."""
    group.add_argument(
        "--tool-call-parser",
        metavar="NAME",
        choices=["auto", "none", *sorted(TOOL_FORMATS)],
        help="the format in which the model calls tools: auto (default), as its files say, or "
        f"{', '.join(sorted(TOOL_FORMATS))}; none: tools are refused",
    )
    group.add_argument(
        "--reasoning-parser",
        metavar="NAME",
        choices=["auto", "none", *sorted(REASONING_FORMATS)],
        help="the format in which it thinks before it answers: auto (default), or "
        f"{', '.join(sorted(REASONING_FORMATS))}; none: its thinking is content",
    )
