"""A server over fake ranks, for benchmarks: writes its port on stdout once it serves, and runs until SIGTERM.

python -m benchmarks.host.http_server FOLDER MAX_NUM_SEQS
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tpworker.runtime.runtime import Runtime
from tpworker.server import bind, run_server
from tpworker.testing.fake_process import FAKE_RANKS


def main(folder: Path, max_num_seqs: int) -> None:
    """Serves until it is told to stop."""
    runtime = Runtime(folder, max_num_seqs=max_num_seqs, num_kv_blocks=1 << 16, **FAKE_RANKS)
    listener = bind("127.0.0.1", 0)

    def on_ready() -> None:
        print(listener.getsockname()[1], flush=True)

    asyncio.run(run_server(runtime, listener, on_ready=on_ready))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
