"""What is counted as it happens: tokens, steps, requests, recoveries. The rest is asked for at a scrape."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

from tpworker.config import MAX_LOOKAHEAD
from tpworker.metrics.histogram import Histogram
from tpworker.outputs import Listener, RequestRecord, RuntimeEvent, StepRecord, step_gap

# All bounds of vLLM are here, so that who asks for one of them finds it. Ours are finer at the lower end.
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_EACH_TOKEN = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2),
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_LENGTH = tuple(mantissa * 10**exponent for exponent in range(9) for mantissa in (1, 2, 5))
_CHOICES = (1, 2, 5, 10, 20)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_RECOVERY = (0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 30, 60, 120, 300)
_GAP = tuple(float(f"{mantissa}e{exponent}") for exponent in range(-6, 0) for mantissa in (1, 2, 5))
_STEP = _GAP[6:]  # from 100 µs
_AHEAD = tuple(range(MAX_LOOKAHEAD + 1))

REASONS = ("stop", "length", "abort", "error")
"""Why requests end, in vLLM's words. Each is counted from the start, so that the first one is a change."""


class Recorder(Listener):
    """Listens to a runtime. Its histograms are in seconds, or counts of tokens, choices and steps.

    Args:
        events: that came before it.
    """

    def __init__(self, events: Sequence[RuntimeEvent] = ()) -> None:
        self.first_token = Histogram(_FIRST_TOKEN)
        """From arrival to first token."""
        self.between_tokens = Histogram(_EACH_TOKEN)
        """Each token after the first: since the one before. Tokens of one step share the time it took."""
        self.ends = dict.fromkeys(REASONS, 0)
        """Choices that ended, by reason. Of those by 'stop' and 'length':"""
        self.whole = Histogram(_REQUEST)
        """From arrival to last token."""
        self.preparation = Histogram(_REQUEST)
        """From arrival until it could be sent to the scheduler."""
        self.queue = Histogram(_REQUEST)
        """From there until its first step."""
        self.prefill = Histogram(_REQUEST)
        """From there to its first token."""
        self.decode = Histogram(_REQUEST)
        """From there to its last token."""
        self.inference = Histogram(_REQUEST)
        """Both."""
        self.token_mean = Histogram(_EACH_TOKEN)
        """Mean time of its tokens after the first."""
        self.prompt_length = Histogram(_LENGTH)
        self.computed_length = Histogram(_LENGTH)
        """Of the prompt, without what was in the prefix cache. Choices but a request's first compute none."""
        self.output_length = Histogram(_LENGTH)
        self.longest_output = Histogram(_LENGTH)
        """Of a request's choices."""
        self.max_tokens = Histogram(_LENGTH)
        """The parameter, where it is given."""
        self.choices = Histogram(_CHOICES)
        """The parameter n."""
        self._siblings: dict[str, list[int]] = {}  # of requests not all of whose choices ended: their lengths

        self.step = Histogram(_STEP)
        """From the start of a step on the device to its end."""
        self.gap = Histogram(_GAP)
        """From the end of a step to the start of the next: the device had nothing to do."""
        self.ahead = Histogram(_AHEAD)
        """Steps that had not ended when one was launched; 0: the device waited for the host."""
        self.step_tokens = Histogram(_STEP_TOKENS)
        """Of prompts, and one for each request that decodes."""
        self.last_step: StepRecord | None = None
        """The one before; None: there was none of these processes."""
        self._ends_ns: deque[int] = deque(maxlen=MAX_LOOKAHEAD + 1)  # of the last steps

        self.recovery = Histogram(_RECOVERY)
        """From the notice of a loss until requests went on."""
        for event in events:
            self.on_event(event)

    def on_event(self, event: RuntimeEvent) -> None:
        if event.kind == "recovered":
            self.recovery.observe(event.seconds or 0.0)
        elif event.kind in ("lost", "sleeping", "updating"):  # the next step is another device's first
            self.last_step = None

    def on_first_tokens(self, waits: Sequence[float]) -> None:
        for seconds in waits:
            self.first_token.observe(seconds)

    def on_tokens(self, intervals: Sequence[tuple[int, float]]) -> None:
        # `Histogram.observe`, written out: this is what is done for every token.
        histogram = self.between_tokens
        bounds, counts, total = histogram.bounds, histogram.counts, 0.0
        for number, seconds in intervals:
            total += seconds
            if number > 1:
                seconds /= number
            counts[bisect_left(bounds, seconds)] += number
        histogram.total += total

    def on_step(self, step: StepRecord) -> None:
        self.step_tokens.observe(step.num_prefill_tokens + step.num_decodes)
        self.step.observe((step.ended_ns - step.started_ns) / 1e9)
        if self.last_step is not None:
            gap = step_gap(step.num_decodes, step.started_ns, self.last_step.ended_ns)
            if gap is not None:
                self.gap.observe(gap / 1e9)
                self.ahead.observe(sum(ended_ns > step.launched_ns for ended_ns in self._ends_ns))
        self.last_step = step
        self._ends_ns.append(step.ended_ns)

    def on_request_end(self, record: RequestRecord) -> None:
        self.ends[record.finish_reason or "error"] += 1
        self._end_choice(record)
        if record.finish_reason not in ("stop", "length"):
            return  # how long it was, its client has said, or a fault
        started, first, last = record.started, record.first_token, record.last_token
        self.whole.observe((record.ended if last is None else last) - record.arrived)
        self.preparation.observe(record.submitted - record.arrived)
        if started is not None and first is not None and last is not None:
            self.queue.observe(started - record.submitted)
            self.prefill.observe(first - started)
            self.decode.observe(last - first)
            self.inference.observe(last - started)
            if record.num_output_tokens > 1:
                self.token_mean.observe((last - first) / (record.num_output_tokens - 1))
        self.prompt_length.observe(record.num_prompt_tokens)
        cached = record.num_cached_tokens if record.index == 0 else record.num_prompt_tokens
        self.computed_length.observe(record.num_prompt_tokens - cached)
        self.output_length.observe(record.num_output_tokens)
        if record.sampling.max_tokens is not None:
            self.max_tokens.observe(record.sampling.max_tokens)

    def _end_choice(self, record: RequestRecord) -> None:
        """What is known of a request when all of its choices have ended."""
        num_choices = record.sampling.n
        lengths = self._siblings.setdefault(record.request_id, [])
        lengths.append(record.num_output_tokens)
        if len(lengths) == num_choices:
            del self._siblings[record.request_id]
            self.choices.observe(num_choices)
            self.longest_output.observe(max(lengths))
