"""The section of the config tree about what a run watches of itself, and when it stops or warns."""

from __future__ import annotations

from moe_dist.config.section import Section, key


class WatchConfig(Section):
    stop_after_nonfinite_steps: int = key(
        3,
        "A step whose loss or gradient is not finite changes nothing and is passed over; at so many in a row the run "
        "stops with exit code 5.",
        "steps",
        ge=1,
    )
    spike_window_steps: int = key(
        64, "Steps whose median and deviation say which loss is usual; 0 warns of no loss.", "steps", ge=0
    )
    spike_deviations: float = key(
        8.0,
        "A loss so many deviations above the median of the window is told as a spike.",
        "deviations",
        gt=0,
    )
    load_window_steps: int = key(
        20, "Steps over which the load of experts is judged together; 0 warns of no expert.", "steps", ge=0
    )
