"""Which tpworker this is."""

from __future__ import annotations


def version() -> str:
    """As it was installed, or 'unknown': it lies on the path, and was not."""
    from importlib import metadata

    try:
        return metadata.version("tpworker")
    except metadata.PackageNotFoundError:
        return "unknown"
