"""One torch thread each, as for the tests of the model."""

from tests.model.conftest import one_thread

__all__ = ["one_thread"]
