"""`tpworker serve`: the HTTP server, or with --ask one answer."""

from __future__ import annotations

import asyncio
import sys

from tpworker.cli.options import Options
from tpworker.errors import ConfigError

_SERVER_PACKAGES = ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client")


def serve(options: Options) -> int:
    """Serve until a signal ends it, and return the exit status."""
    try:
        from tpworker.server import bind, run_server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _SERVER_PACKAGES:
            raise
        raise ConfigError(
            f"the HTTP server needs the package {error.name}, which is not installed: "
            "pip install 'tpworker[server]' (--ask works without it)"
        ) from error
    from tpworker.runtime import Runtime
    from tpworker.terminal import StartProgress, ready_text

    listener = bind(options.host, options.port)
    with StartProgress() as progress:
        runtime = Runtime(config=options.config, progress=progress)

        def on_ready() -> None:
            progress.close()
            port = listener.getsockname()[1]
            text = ready_text(
                runtime, options.host, port, options.served_model_name, options.api_key is not None
            )
            print(text, file=sys.stderr, flush=True)

        asyncio.run(
            run_server(runtime, listener, options.served_model_name, options.api_key, on_ready=on_ready)
        )
    return 0


def ask(options: Options, question: str) -> int:
    """Answer one question on stdout, and return the exit status."""
    from tpworker.ask import answer
    from tpworker.terminal import StartProgress

    with StartProgress() as progress:
        asyncio.run(answer(options.config, question, progress))
    return 0
