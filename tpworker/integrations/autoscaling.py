"""How many replicas Ray Serve is to have, by our own count of what is to be done.

Serve counts requests; a request of several choices is as many here, as it is for the scheduler. It pickles
this function for its controller: it must not need anything of ours.
"""

from __future__ import annotations

from typing import Any

OPEN = "tpworker_open"
"""What a replica reports: choices that run or wait there (`Stats.open`)."""


def by_open_choices(context: Any) -> tuple[float, dict[str, Any]]:
    """As many replicas as have `target_ongoing_requests` open choices each; Serve's own delays, factors and
    bounds come on top.

    Args:
        context: an `AutoscalingContext` of Ray Serve.
    """
    reported = (context.aggregated_metrics or {}).get(OPEN, {})
    load = sum(reported.values()) + (context.total_queued_requests or 0.0)
    return load / context.config.target_ongoing_requests, {}
