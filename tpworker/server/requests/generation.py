"""What all requests to generate take."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from tpworker.config import SamplingParams
from tpworker.errors import InvalidRequest
from tpworker.server.ignored import ignore
from tpworker.server.requests.fields import Body, Integer

Prompt = str | list[int]

MAX_STOP_CHARS = 1024


class StreamOptions(Body):
    """`stream_options`."""

    place = "stream_options."

    include_usage: bool | None = None
    """Whether a last chunk without choices tells the token counts of the whole request."""
    include_obfuscation: bool | None = None
    """Random padding against traffic analysis; none is sent, whatever is asked."""


StopString = Annotated[str, Field(max_length=MAX_STOP_CHARS)]


def _as_list(stop: Any) -> Any:
    """One string as a list of one. An empty one stops nothing."""
    if isinstance(stop, str):
        return [stop] if stop else []
    return stop


class GenerationRequest(Body):
    """What all requests to generate take."""

    accepted: ClassVar[frozenset[str]] = frozenset(
        [
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "parallel_tool_calls",
        ]
    )

    model: str | None = None
    """The served model's name; may be left out."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_tokens: Integer | None = None
    seed: Integer | None = None
    stop: Annotated[list[StopString] | None, BeforeValidator(_as_list)] = None
    stop_token_ids: list[Integer] | None = None
    ignore_eos: bool | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @model_validator(mode="after")
    def _only_with_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            ignore("stream_options")
        return self

    def _sampling(self, max_tokens: int | None, detokenize: bool) -> SamplingParams:
        if self.stop and not detokenize:
            raise InvalidRequest(
                "stop strings are for text, and this model has no tokenizer: use stop_token_ids",
                parameter="stop",
            )
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_tokens=self.min_tokens or 0,
            seed=self.seed,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
            detokenize=detokenize,
        )
