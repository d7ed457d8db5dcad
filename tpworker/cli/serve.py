"""`tpworker serve`: the HTTP server, or with --ask one answer."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

from tpworker.cli.log_options import say
from tpworker.cli.options import Options
from tpworker.cli.trace_options import traced
from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError
from tpworker.logs import JSON

logger = logging.getLogger(__name__)

_SERVER_PACKAGES = ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client")
_DOCTOR_S = 1.0


def serve(options: Options) -> int:
    """Serve until a signal ends it, and return the exit status."""
    try:
        from tpworker.server import FrontOptions, Tls, bind, raise_descriptor_limit, run_server
        from tpworker.server.serve import DRAIN_S
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _SERVER_PACKAGES:
            raise
        raise ConfigError(
            f"the HTTP server needs the package {error.name}, which is not installed: "
            "pip install 'tpworker[server]' (--ask works without it)"
        ) from error
    from tpworker.cli.terminal import StartProgress, ready_line, ready_text
    from tpworker.runtime.runtime import Runtime

    raise_descriptor_limit(options.config)
    listener = bind(options.host, options.port)
    with closing(StartProgress()) as progress, _warnings(options.config):
        runtime = Runtime(config=options.config, progress=progress)

        def on_ready() -> None:
            progress.close()
            port = listener.getsockname()[1]
            if options.log.log_format == JSON:
                say(ready_line(runtime, options, port))
            else:  # at once, its last line's end too: the log is another thread's
                sys.stderr.write(f"{ready_text(runtime, options, port)}\n")

        front = FrontOptions(
            served_model_names=options.served_model_names,
            api_key=options.api_key,
            allowed_origins=options.allowed_origins,
            root_path=options.root_path,
            force_include_usage=options.force_include_usage,
            enable_sleep_mode=options.enable_sleep_mode,
            enable_weight_updates=options.enable_weight_updates,
            tool_call_parser=options.tool_call_parser,
            reasoning_parser=options.reasoning_parser,
            log_prompts=options.log.prompts,
            trace=options.traces.file,
            has_trace_context=options.traces.otlp_endpoint is not None,
        )
        tls = None if options.tls_files is None else Tls(*options.tls_files)
        timeout = DRAIN_S if options.shutdown_timeout is None else options.shutdown_timeout
        with traced(runtime, options.traces):
            asyncio.run(
                run_server(runtime, listener, front, tls=tls, on_ready=on_ready, drain_timeout=timeout)
            )
    return 0


@contextmanager
def _warnings(config: RuntimeConfig) -> Iterator[None]:
    """Meanwhile, beside the start, what `tpworker doctor` would warn of is said."""
    thread = threading.Thread(target=_warn, args=[config], name="tpworker-doctor", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(_DOCTOR_S)  # it has long ended, unless the start was refused at once, or a driver is sick


def _warn(config: RuntimeConfig) -> None:
    from tpworker.doctor.doctor import troubles

    try:
        for check in troubles(config):
            remedy = f"; {check.remedy}" if check.remedy else ""
            say(f"{check.subject}: {check.found}{remedy}", logging.WARNING, label="warning: ")
    except Exception:
        logger.info("the doctor could not look at this machine", exc_info=True)


def ask(options: Options, question: str) -> int:
    """Answer one question on stdout, and return the exit status."""
    from tpworker.cli.ask import answer
    from tpworker.cli.terminal import StartProgress

    with closing(StartProgress()) as progress:
        asyncio.run(answer(options.config, question, progress))
    return 0
