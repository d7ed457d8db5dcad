"""How the HTTP front is set up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FrontOptions:
    """What the front is told besides the runtime that it serves."""

    served_model_names: tuple[str, ...] = ()
    """What clients may call the model; the first is in answers. None: what the runtime calls it."""
    api_key: str | None = None
    """What they must send as a Bearer token; None: nothing."""
    allowed_origins: tuple[str, ...] = ()
    """Of web pages that browsers may let use the API, as https://host; "*": all."""
    root_path: str = ""
    """The path under which a proxy shows the server to clients, as /llm. It may strip it, or leave it on."""
    force_include_usage: bool = False
    """Streams tell the token counts where nobody asks for them, too."""


@dataclass(frozen=True)
class Tls:
    """The files that TLS needs, as PEM."""

    certfile: str
    """The server's certificate, and those between it and one that clients know."""
    keyfile: str | None = None
    """Its key; None: that is in `certfile` too."""
