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
