"""From a request's body to the streams that answer it: what all endpoints share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from tpworker.errors import InvalidRequest, RuntimeFailed, RuntimeSleeping, RuntimeStopped
from tpworker.sampling_params import SamplingParams
from tpworker.server import journal
from tpworker.server.answer import Answer
from tpworker.server.dialect import Dialect
from tpworker.server.errors import ModelNotFound
from tpworker.server.formats import Format
from tpworker.server.options import FrontOptions
from tpworker.server.request_log import RequestLog, shown_prompt
from tpworker.server.requests import GenerationRequest, Prompt
from tpworker.server.timing import FrontMetrics, Timing

if TYPE_CHECKING:
    from tpworker.runtime.runtime import Runtime
    from tpworker.text.tokenizer import Tokenizer


class Front:
    """Whether a request can be answered, and the answer.

    Args:
        runtime: may be starting still.
        options: of the app.
        metrics: what it counts.
        log: of the requests.
    """

    def __init__(
        self, runtime: Runtime, options: FrontOptions, metrics: FrontMetrics, log: RequestLog
    ) -> None:
        self.runtime = runtime
        self.force_usage = options.force_include_usage
        self._options = options
        self._names = options.served_model_names
        self._metrics = metrics
        self._log = log
        self._dialect: Dialect | None = None

    @property
    def model_names(self) -> tuple[str, ...]:
        """What clients may call the model. Raises RuntimeStopped while it is not known yet."""
        return self._names or (self.runtime.served_name,)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's, if it has one."""
        return self.runtime.tokenizer if self.runtime.has_tokenizer else None

    @property
    def dialect(self) -> Dialect:
        """That of the model, which has a tokenizer, once the runtime is ready."""
        if self._dialect is None:
            options = self._options
            self._dialect = Dialect.of(
                self.runtime.spec.model_type,
                self.runtime.tokenizer,
                options.tool_call_parser,
                options.reasoning_parser,
            )
        return self._dialect

    def max_model_len(self) -> int:
        """0 while it is not known yet: then nothing is generated."""
        try:
            return self.runtime.max_model_len
        except RuntimeStopped:
            return 0

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFound unless this is the model that is served, or none."""
        if name is not None and name not in self.model_names:
            served = ", ".join(map(repr, self.model_names))
            verb = "is" if len(self.model_names) == 1 else "are"
            raise ModelNotFound(f"the model {name!r} is not served here; {served} {verb}", "model")

    def admit(self, model: str | None) -> Timing:
        """Raises ModelNotFound, or RuntimeStopped or RuntimeFailed when nothing can be done."""
        timing = Timing(self._metrics)
        health = self.runtime.health()
        if health.state == "failed":
            raise RuntimeFailed(health.summary)
        if health.state == "sleeping":
            raise RuntimeSleeping(
                "the server sleeps, and takes no requests until it is woken up: POST /wake_up"
            )
        if health.state not in ("ready", "recovering", "updating"):  # what comes meanwhile, waits
            raise RuntimeStopped(f"the server is not ready, it is {health.state}: try again later")
        self.check_model(model)
        return timing

    def check_text(self, remedy: str, parameter: str) -> None:
        """Raises InvalidRequest if the model has no tokenizer: then there are token ids, and no text."""
        if not self.runtime.has_tokenizer:
            raise InvalidRequest(f"this model has no tokenizer: {remedy}", parameter)

    def answer(
        self,
        body: GenerationRequest,
        prompts: Sequence[Prompt],
        answer_format: Format,
        timing: Timing,
        sampling: SamplingParams,
    ) -> Answer:
        """The answer to prompts.

        Args:
            answer_format: how it is written.
            timing: from `admit`.
            sampling: the body's.
        """
        name = answer_format.request_id
        # What stands behind the name can be no part of another one's: X-Request-Id has no spaces.
        ids = [name] if len(prompts) == 1 else [f"{name} prompt {i}" for i in range(len(prompts))]
        asks = [
            partial(
                self.runtime.collect,
                prompt,
                sampling,
                request_id=request_id,
                default_max_tokens=body.default_max_tokens,
            )
            for prompt, request_id in zip(prompts, ids, strict=True)
        ]
        if (entry := journal.current.get()) is not None:
            entry.answer_id, entry.runtime_ids = answer_format.request_id, ids
            entry.stream = bool(body.stream)
            if max_chars := self._options.log_prompts:
                decode = None if self.tokenizer is None else self.tokenizer.decode
                entry.prompt = shown_prompt(prompts[0], decode, max_chars)
            self._log.follow(entry)
        return Answer(asks, answer_format, timing, stream=bool(body.stream), reword=body.in_its_words)
