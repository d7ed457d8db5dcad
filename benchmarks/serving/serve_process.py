"""`tpworker serve`, which tells on stdout when it is ready and writes down its last steps in the end.

python -m benchmarks.serving.serve_process STEPS_FILE serve [options of `tpworker serve`]
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from tpworker.cli import parse
from tpworker.runtime.runtime import Runtime
from tpworker.server import bind, run_server


def main(steps_file: Path, arguments: list[str]) -> None:
    """Serves until it is told to stop."""
    options = parse(arguments)
    runtime = Runtime(config=options.config)
    listener = bind(options.host, options.port)

    def on_ready() -> None:
        print(
            json.dumps({"port": listener.getsockname()[1], "vocab_size": runtime.spec.vocab_size}), flush=True
        )

    asyncio.run(run_server(runtime, listener, on_ready=on_ready))
    steps_file.write_text(json.dumps(runtime.stats().recent_steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
