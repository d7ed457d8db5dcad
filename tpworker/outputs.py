"""What a runtime gives its caller: a request's outputs, and how the runtime itself is doing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tpworker.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]
RuntimeState = Literal[
    "stopped", "starting", "ready", "recovering", "draining", "failed", "sleeping", "updating"
]
UP: frozenset[RuntimeState] = frozenset({"ready", "recovering", "draining", "sleeping", "updating"})
"""In which a runtime has been ready, and neither stopped nor failed."""
RUNTIME_STATES: tuple[RuntimeState, ...] = get_args(RuntimeState)
EventKind = Literal["lost", "recovering", "recovered", "given_up", "sleeping", "woken", "updating", "updated"]
SleepLevel = Literal[1, 2]
WakeTag = Literal["weights", "kv_cache"]


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities where one token stands, of the whole vocabulary, in float32: of the
    model's logits as they are, before temperature, penalties, bias and masks. NaN where logits are."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """Of the likeliest tokens there, as many as were asked for: (token id, logprob), best first."""


class RequestOutput(NamedTuple):
    """What has come of one choice of a request since its output before. A tuple: one is made for every token.

    A consumer that is slower than the model gets several tokens in one output; none is lost or repeated.
    """

    request_id: str
    text: str
    """New text. It may lag behind the tokens: a cut UTF-8 character, or the possible beginning of a stop
    string, is held back until more is known."""
    token_ids: tuple[int, ...]
    """New tokens. Stop tokens and the tokens of a stop string are among them, though not in the text."""
    finish_reason: FinishReason | None
    """None: more will come. 'stop': an end-of-sequence token, a stop token or a stop string; 'length':
    max_tokens, or max_model_len; 'abort': by `Runtime.abort`."""
    stop_reason: int | str | None
    """With 'stop': the stop string, or the id out of `stop_token_ids`. None: the model's own end."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose KV was found in the prefix cache; what another choice computes does not count."""
    num_output_tokens: int
    """Tokens of this choice so far, these included."""
    index: int = 0  # type: ignore[assignment]  # instead of a tuple's method, which nobody wants here
    """Which choice this is of, from 0 to `SamplingParams.n` - 1. Each has a last output of its own. Their
    prompt is computed once: both counts of its tokens are the same for all."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """Of `token_ids`, one each; None: not asked for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """Of the prompt's tokens, one each, None for the first, before which nothing stands. With the first
    output of choice 0, which comes before any other's; None: not asked for, or told already."""
    num_draft_tokens: int = 0
    """Drafts that were checked for this choice so far (`RuntimeConfig.speculative_method`)."""
    num_accepted_tokens: int = 0
    """Of these, how many were right, and so came beside the token that each step yields: even if they stand
    behind a stop string, and are not delivered."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole choice of a request, from `SyncRuntime.complete`. The fields are those of `RequestOutput`."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a runtime can serve."""

    state: RuntimeState
    error: str | None = None
    """With 'failed', and while it recovers: what happened, naming the process at fault, and its traceback."""

    @property
    def summary(self) -> str:
        """The first line of that; '' without an error."""
        return (self.error or "").partition("\n")[0]


@dataclass(frozen=True, slots=True)
class RuntimeEvent:
    """What has become of a runtime's processes, for its owner: for a health view, say."""

    kind: EventKind
    """'lost': a process died, hangs, diverged or raised. 'recovering': the group is started anew.
    'recovered': requests go on. 'given_up': after too many restarts; the runtime has failed. No fault, but
    at the owner's wish: 'sleeping', 'woken'; 'updating', 'updated', or 'woken' with the old weights."""
    time: float
    """When: time.time()."""
    generation: int
    """Of processes, that this is about: 0 from the start, one more with every restart."""
    process: str
    """At fault, e.g. `tpworker-rank1`; '' if none is."""
    summary: str
    """What happened, in one line."""
    seconds: float | None = None
    """With 'recovered': since the loss was noticed. With those that are no fault: what it took."""
    requests: int = 0
    """With all but 'lost' and 'given_up': those that are open, and go on."""


class RequestRecord(NamedTuple):
    """One choice of a request, when it has ended. Times are those of `time.monotonic`, in seconds; None: it
    did not come so far."""

    request_id: str
    index: int  # type: ignore[assignment]  # as in RequestOutput
    finish_reason: FinishReason | None
    """As its last output had it; 'abort' also of one that its consumer has left. None: it failed."""
    error: str | None
    """Why it failed, in one line."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Of these: found in the prefix cache, by choice 0."""
    num_output_tokens: int
    """That its consumer got."""
    num_draft_tokens: int
    num_accepted_tokens: int
    num_resumed: int
    """Restarts that it went through."""
    arrived: float
    """When `generate` was called."""
    submitted: float
    """When its prompt was tokens, its parameters had been checked, and it could be sent to the scheduler."""
    started: float | None
    """When the first step that computed some of it was launched."""
    first_token: float | None
    last_token: float | None
    """When the runtime had these."""
    ended: float
    """When its consumer took its last output, or left."""
    sampling: SamplingParams

    def phases(self) -> list[tuple[str, float, float]]:
        """Those that it has come to: name, begin, end. 'prepare' lasts until it was submitted, 'queue' until
        it was started, 'prefill' until its first token, 'decode' until its last; or else until it ended."""
        stations = (self.arrived, self.submitted, self.started, self.first_token, self.last_token)
        reached = [station for station in stations if station is not None]
        if self.last_token is None:
            reached.append(self.ended)
        names = ("prepare", "queue", "prefill", "decode")
        return list(zip(names, reached, reached[1:], strict=False))


class StepRecord(NamedTuple):
    """One step, as rank 0's device saw it. Times are CLOCK_MONOTONIC in nanoseconds (`time.monotonic_ns`).
    Between one and the next is the step gap, see `step_gap`."""

    step: int
    num_prefill_tokens: int
    num_decodes: int
    launched_ns: int
    started_ns: int
    ended_ns: int
    num_drafts: int = 0
    """Of each request that decodes, at most: the step checked so many tokens more of it."""


def step_gap(num_decodes: int, started_ns: int, last_ended_ns: int) -> int | None:
    """The step gap: for how long the device had nothing to do before a step, in nanoseconds.

    Args:
        num_decodes, started_ns: of the step.
        last_ended_ns: when the step before it ended.

    Returns:
        None where it decodes nothing: before such steps there may have been no request at all.
    """
    return max(0, started_ns - last_ended_ns) if num_decodes else None


@dataclass(frozen=True, slots=True)
class Stats:
    """How busy a runtime is. Counters count from its start; the rest is as of the last step.

    Each choice of a request counts as a request; their prompt's tokens count once.
    """

    open: int
    """Requests that are not ended, those still being tokenised included."""
    running: int
    """Requests that have got a slot; those that lost it by preemption, and wait for another, included."""
    waiting: int
    """Requests that have not got one yet, those still being tokenised included."""
    free_blocks: int
    """KV blocks that can be given out, those that only the prefix cache holds included."""
    total_blocks: int
    """KV blocks that requests can have."""
    steps: int
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt tokens: found in the prefix cache."""
    output_tokens: int
    preemptions: int
    finished: int
    """Requests that ended by 'stop' or 'length'."""
    aborted: int
    recent_steps: tuple[StepRecord, ...]
    """The last steps, at most 4096, oldest first."""
    draft_tokens: tuple[int, ...] = ()
    """Drafts that were checked, by position: how many requests and steps had a first one, a second, …; those
    of steps computed ahead for a request that had ended do not count."""
    accepted_tokens: tuple[int, ...] = ()
    """How many of them were right, and so all before them."""
    restarts: int = 0
    """How often the group of processes has been started anew."""
    resumed_requests: int = 0
    """Requests that went on after a restart, each as often as it did."""
    lost: tuple[tuple[str, int], ...] = ()
    """Processes at fault, by kind ('rank', 'scheduler', …), and how often."""
    last_recovery_seconds: float | None = None
    """From the notice of the last loss until requests went on; None: there was none."""


class TraceSummary(NamedTuple):
    """What has become of a trace (`Runtime.stop_trace`)."""

    path: str
    num_events: int
    num_dropped: int
    """Of records that came too quickly, or when it was full."""
    num_bytes: int
    is_full: bool
    """It has come to its limit, and ends there."""


class Listener:
    """What a runtime tells whoever wants to know, as it happens (`Runtime.add_listener`): a base class, whose
    methods do nothing. They are called on the runtime's event loop, and must be quick; what they raise is
    logged, the first time."""

    def on_event(self, event: RuntimeEvent) -> None:
        """Something has become of a process."""

    def on_request_end(self, record: RequestRecord) -> None:
        """A choice of a request has ended. One that is refused just raises, in `generate`."""

    def on_first_tokens(self, waits: Sequence[float]) -> None:
        """A step's tokens have come. Of each choice whose first is among them: seconds since it arrived."""

    def on_tokens(self, intervals: Sequence[tuple[int, float]]) -> None:
        """A step's tokens have come. Of each request that had some already: how many, and how many seconds
        after those before."""

    def on_step(self, step: StepRecord) -> None:
        """A step's result has come, behind its tokens."""
