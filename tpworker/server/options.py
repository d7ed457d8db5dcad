"""How the HTTP front is set up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tpworker.errors import ConfigError, shown
from tpworker.parsing import REASONING_FORMATS, TOOL_FORMATS
from tpworker.server.dialect import AUTO, NONE


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
    enable_sleep_mode: bool = False
    """There are /sleep, /wake_up and /is_sleeping, for whoever may send requests."""
    enable_weight_updates: bool = False
    """There is /update_weights_from_disk, which reads whatever folder it is told to."""
    tool_call_parser: str = AUTO
    """The format of the model's calls of tools, a name of `tpworker.parsing.TOOL_FORMATS`; `auto`: as the
    model's files say; `none`: tools are refused, unless `tool_choice` is none, too."""
    reasoning_parser: str = AUTO
    """The same of its thinking, of `REASONING_FORMATS`."""
    log_prompts: int = 0
    """Most characters of a request's first prompt that its line in the log shows; 0: none."""

    trace: Path | None = None
    """The file of the first timeline; later ones are begun and ended by clients. None: none are."""
    has_trace_context: bool = False
    """Whether requests belong to the traces that their headers name (extra `otlp`)."""

    def __post_init__(self) -> None:
        if self.log_prompts < 0:
            raise ConfigError(f"log_prompts={self.log_prompts}: must be 0 (none) or more characters")
        for name, formats in (("tool_call_parser", TOOL_FORMATS), ("reasoning_parser", REASONING_FORMATS)):
            value, known = getattr(self, name), (AUTO, NONE, *sorted(formats))
            if value not in known:
                raise ConfigError(f"{name}={shown(value)}: must be one of {', '.join(known)}")


@dataclass(frozen=True)
class Tls:
    """The files that TLS needs, as PEM."""

    certfile: str
    """The server's certificate, and those between it and one that clients know."""
    keyfile: str | None = None
    """Its key; None: that is in `certfile` too."""
