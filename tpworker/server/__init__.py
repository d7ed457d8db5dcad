"""The OpenAI-compatible HTTP server. Needs the extra `server`; nothing else in tpworker imports it."""

from tpworker.server.app import create_app
from tpworker.server.descriptors import raise_descriptor_limit
from tpworker.server.options import FrontOptions, Tls
from tpworker.server.serve import bind, run_server

__all__ = ["FrontOptions", "Tls", "bind", "create_app", "raise_descriptor_limit", "run_server"]
