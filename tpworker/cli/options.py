"""What the command line says, checked."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpworker.cli.bench import bench_options
from tpworker.cli.config_file import words_of
from tpworker.cli.explain import Flags, explain
from tpworker.cli.log_options import LogOptions, log_options_in
from tpworker.cli.parser import DEFAULT_HOST, DEFAULT_PORT, flag_of, make_parser
from tpworker.cli.rank_options import RankOptions, rank_options
from tpworker.cli.server_options import (
    checked_names,
    checked_root_path,
    find_api_key,
    parse_origins,
    tls_files,
)
from tpworker.cli.speculation import speculation_in
from tpworker.cli.top import top_options
from tpworker.cli.trace_options import TraceOptions, trace_options_in
from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError, shown
from tpworker.values import is_utf8

if TYPE_CHECKING:
    from tpworker.bench.bench import BenchOptions
    from tpworker.top.top import TopOptions

_SERVER_OPTIONS = (
    "host",
    "port",
    "served_model_name",
    "api_key",
    "api_key_file",
    "allowed_origins",
    "root_path",
    "ssl_certfile",
    "ssl_keyfile",
    "shutdown_timeout",
    "force_include_usage",
    "enable_sleep_mode",
    "enable_weight_updates",
    "tool_call_parser",
    "reasoning_parser",
)


@dataclass(frozen=True)
class Options:
    """What the command line says, checked."""

    config: RuntimeConfig
    host: str
    port: int
    served_model_names: tuple[str, ...]
    api_key: str | None
    allowed_origins: tuple[str, ...]
    root_path: str
    tls_files: tuple[str, str | None] | None
    """The certificate's file and the key's, which may be the same (None); None: no TLS."""
    shutdown_timeout: float | None
    """Seconds; None: as many as are usual."""
    force_include_usage: bool
    enable_sleep_mode: bool
    enable_weight_updates: bool
    tool_call_parser: str
    reasoning_parser: str
    log: LogOptions
    traces: TraceOptions
    ask: str | None


@dataclass(frozen=True)
class DoctorOptions:
    """What the command line of `tpworker doctor` says, checked."""

    config: RuntimeConfig
    as_json: bool


def parse(
    arguments: Sequence[str] | None = None,
) -> Options | DoctorOptions | TopOptions | BenchOptions | RankOptions:
    """Read the command line.

    Raises:
        ConfigError: a value out of range, or an option that has no effect beside the others.
        SystemExit: what argparse itself finds, or --help.
    """
    parser, flags = make_parser()
    words = _with_model_named(list(sys.argv[1:] if arguments is None else arguments), flags)
    for number, word in enumerate(words, 1):
        if not is_utf8(word):  # not shown: it may be a key
            raise ConfigError(f"word {number} on the command line is not UTF-8, and must be")
    if words[:1] == ["top"]:
        return top_options(vars(parser.parse_args(words)))
    if words[:1] == ["bench"]:
        return bench_options(vars(parser.parse_args(words)))
    if words[:1] == ["rank"]:
        return rank_options(vars(parser.parse_args(words)))
    known, unknown = parser.parse_known_args(words)
    if unknown:
        raise ConfigError(explain(unknown, words, flags))
    given = vars(known)
    command = given.pop("command")
    if (file := given.pop("config", None)) is not None:
        given = _options_in(file, flags) | given
    given = speculation_in(given)
    given.setdefault("tensor_parallel_size", _default_tensor_parallel_size(given.get("device", "auto")))
    return _doctor_options(given) if command == "doctor" else _serve_options(given)


def _options_in(file: str, flags: Mapping[str, Flags]) -> dict[str, Any]:
    """What --config adds: options of `serve` that count where the command line says nothing else."""
    parser, _ = make_parser(source=f"{file}: ")
    options = vars(parser.parse_args(["serve", *words_of(file, flags)]))
    del options["command"]
    return options


def _with_model_named(words: list[str], commands: Collection[str]) -> list[str]:
    """A model may come first, without --model: there it can be no option's value."""
    if len(words) < 2 or words[0] not in commands or words[1].startswith("-"):
        return words
    command, model, *rest = words
    if named := next((word for word in rest if word.partition("=")[0] == "--model"), None):
        raise ConfigError(f"a model is named twice, {shown(model)} and by {shown(named)}: leave out one")
    return [command, "--model", model, *rest]


def _doctor_options(given: dict[str, Any]) -> DoctorOptions:
    as_json = given.pop("json", False)
    for name in given:
        if "model" not in given and name not in ("device", "tensor_parallel_size"):
            raise ConfigError(f"--{name.replace('_', '-')} has no effect without --model: leave it out")
    return DoctorOptions(RuntimeConfig(**given), as_json)


def _serve_options(given: dict[str, Any]) -> Options:
    lookahead = _lookahead(given.pop("enable_overlap_schedule", None), given.get("lookahead"))
    if lookahead is not None:
        given["lookahead"] = lookahead
    serving = {name: given.pop(name) for name in _SERVER_OPTIONS if name in given}
    ask = given.pop("ask", None)
    log = log_options_in(given, serves=ask is None)
    traces = trace_options_in(given, serves=ask is None)
    if ask is not None:
        without_effect = {"max_queue", "scheduling_policy", "kv_events_config"} & given.keys()
        for name in [*serving, *without_effect]:
            raise ConfigError(f"{flag_of(name)} has no effect with --ask, which serves nobody: leave it out")
    if not 0 <= serving.get("port", DEFAULT_PORT) <= 65535:
        raise ConfigError(f"--port {shown(serving['port'])}: must be from 0 (any that is free) to 65535")
    if ask == "":
        raise ConfigError("--ask must not be empty: leave it out")
    if given.get("max_restarts") == 0 and "restart_window" in given:
        raise ConfigError("--restart-window has no effect with --max-restarts 0: leave out one")
    timeout = serving.get("shutdown_timeout")
    if timeout is not None and not 0 <= timeout <= 86400:
        raise ConfigError(f"--shutdown-timeout {shown(timeout)}: must be from 0 to 86400 seconds")
    key = None
    if ask is None:
        key = find_api_key(serving.get("api_key"), serving.get("api_key_file"), os.environ)
    origins = serving.get("allowed_origins")
    return Options(
        config=RuntimeConfig(**given),
        host=_host(serving["host"]) if "host" in serving else DEFAULT_HOST,
        port=serving.get("port", DEFAULT_PORT),
        served_model_names=checked_names(serving.get("served_model_name", ())),
        api_key=key,
        allowed_origins=() if origins is None else parse_origins(origins),
        root_path=checked_root_path(serving.get("root_path", "")),
        tls_files=tls_files(serving.get("ssl_certfile"), serving.get("ssl_keyfile")),
        shutdown_timeout=timeout,
        force_include_usage=serving.get("force_include_usage", False),
        enable_sleep_mode=serving.get("enable_sleep_mode", False),
        enable_weight_updates=serving.get("enable_weight_updates", False),
        tool_call_parser=serving.get("tool_call_parser", "auto"),
        reasoning_parser=serving.get("reasoning_parser", "auto"),
        log=log,
        traces=traces,
        ask=ask,
    )


def _host(text: str) -> str:
    """An address or a name, an IPv6 address without the brackets that it has in URLs."""
    import ipaddress

    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        if ":" in host:
            ipaddress.ip_address(host.partition("%")[0])  # an IPv6 address, perhaps with a zone
        else:
            host.encode("idna")  # as looking it up does, with the same errors
        is_fine = host.isprintable() and not {" ", "/", ""} & {host, *host}
    except ValueError:
        is_fine = False
    if not is_fine:
        raise ConfigError(
            f"--host {shown(text)}: must be an IP address or a name, without scheme or port: 127.0.0.1 for "
            "this machine alone, 0.0.0.0 or :: for all of its addresses"
        )
    return host


def _lookahead(overlap: bool | None, lookahead: int | None) -> int | None:
    if overlap is False and lookahead:
        raise ConfigError(
            f"--lookahead {lookahead} has no effect with --no-enable-overlap-schedule: leave out one"
        )
    if overlap is True and lookahead == 0:
        raise ConfigError(
            "--lookahead 0 switches off what --enable-overlap-schedule switches on: leave out one"
        )
    return 0 if overlap is False else lookahead


def _default_tensor_parallel_size(device: str) -> int:
    """2 on the CPU, where a rank costs little; on GPUs 1, for each rank takes a whole one."""
    from tpworker.observe.gpus import count_gpus

    return 2 if device == "cpu" or (device == "auto" and not count_gpus()) else 1
