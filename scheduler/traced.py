"""What the scheduler tells a timeline of its plans."""

from __future__ import annotations

from tpworker.ipc.trace import Kind, Teller
from tpworker.scheduler.composer import Composer
from tpworker.scheduler.inflight import InFlight


def end_planned(trace: Teller, plan: InFlight, composer: Composer) -> None:
    """Of a plan that has been streamed, with how busy the scheduler is."""
    if trace.is_told:
        tokens = plan.num_prefill_tokens << 32 | plan.num_decodes
        requests = len(composer.running) << 32 | len(composer.waiting)
        trace.end(Kind.PLANNED, tokens, composer.pool.num_free, requests)
