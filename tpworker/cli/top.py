"""The command line of `tpworker top`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tpworker.cli.arguments import number
from tpworker.cli.server_options import add_key_options, find_api_key
from tpworker.errors import ConfigError, shown

if TYPE_CHECKING:
    from tpworker.top.top import TopOptions

LEAST_INTERVAL, MOST_INTERVAL = 0.1, 60.0


def add_top(commands: Any) -> None:
    """Adds the command.

    Args:
        commands: argparse's subparsers.
    """
    parser = commands.add_parser(
        "top",
        usage="tpworker top [PID|URL] [OPTION …]",
        help="show what a tpworker does, live in the terminal",
        description="Show what a tpworker does, live in the terminal: its processes, steps, KV blocks and "
        "oldest requests. q or Ctrl-C ends it. Where stdout is no terminal, one frame is printed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="PID|URL",
        help="a process on this machine, the server's or any of its own, also of a program that embeds "
        "tpworker; or the URL of a server (default: the one that this user runs)",
    )
    parser.add_argument("--once", action="store_true", help="print one frame and exit")
    parser.add_argument("--json", action="store_true", help="print one frame as JSON and exit")
    parser.add_argument(
        "--interval",
        type=number,
        default=1.0,
        metavar="SECONDS",
        help=f"between two frames, from {LEAST_INTERVAL:g} to {MOST_INTERVAL:g} (default: 1)",
    )
    add_key_options(parser, "with a URL: what the server wants to be sent")


def top_options(given: dict[str, Any]) -> TopOptions:
    """What was given, checked.

    Raises:
        ConfigError: it is neither a pid nor a URL, or an option has no effect.
    """
    from tpworker.top.top import TopOptions

    target, interval = given["target"], given["interval"]
    if not LEAST_INTERVAL <= interval <= MOST_INTERVAL:
        raise ConfigError(
            f"--interval {shown(interval)}: must be from {LEAST_INTERVAL:g} to {MOST_INTERVAL:g} seconds"
        )
    is_url = target is not None and "://" in target
    for name in ("api_key", "api_key_file"):
        if given[name] is not None and not is_url:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect without a URL: leave it out")
    if target is not None and not is_url and not (target.isdecimal() and int(target)):
        raise ConfigError(f"{shown(target)} is neither a process' number nor a URL, as http://host:port")
    key = find_api_key(given["api_key"], given["api_key_file"], os.environ) if is_url else None
    return TopOptions(
        target=int(target) if target is not None and not is_url else target,
        once=given["once"],
        as_json=given["json"],
        interval=interval,
        api_key=key,
    )
