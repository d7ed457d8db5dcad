"""The server of the integration tests, for CUDA ranks."""

from tests.integration.conftest import start_server

__all__ = ["start_server"]
