"""Whether kernels in Gluon can be used: Triton's lower level, which it calls an experiment."""

from __future__ import annotations

import importlib
import logging
from functools import cache

logger = logging.getLogger(__name__)


@cache
def has_gluon(kernel: str) -> bool:
    """Whether this module of kernels loads."""
    try:
        importlib.import_module(kernel)
    except (ImportError, AttributeError) as error:
        logger.warning("%s cannot be used with this Triton, and steps will be slower: %s", kernel, error)
        return False
    return True
