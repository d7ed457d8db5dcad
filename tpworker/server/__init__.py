"""The OpenAI-compatible HTTP server. Needs the extra `server`; nothing else in tpworker imports it."""

from tpworker.server.app import create_app
from tpworker.server.serve import bind, run_server

__all__ = ["bind", "create_app", "run_server"]
