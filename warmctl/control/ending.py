"""When warmup is over: the rate has reached no new high for long, and is not on its way back from a cut or a fall."""

from __future__ import annotations

from dataclasses import dataclass

from warmctl.state import COUNT, POSITIVE, Allowed, FloatState, saved

SETTLED_AGE, SETTLED_STEPS, SETTLED_BELOW = 1.5, 20, 100
"""The run is so many times as old as at its highest rate, and so many steps older; more of them below the full rate,
for no way leads up again."""
HIGHER, RECOVERED, PATIENCE, PATIENCE_STEPS = 1.1, 0.9, 4.0, 200
"""A new high is so much higher; the end waits for a scale that is lower since then to come back this far, up to so many
times the age, or steps."""


@dataclass
class Ending(FloatState):
    """The highest rate so far, and when it was."""

    highest: float = saved(0.0, POSITIVE)
    scale: float = saved(0.0, Allowed(0.0, 1.0))
    age: float = saved(0.0, COUNT)

    def is_high(self, applied: float) -> bool:
        """Whether an applied rate is above any so far."""
        return applied >= HIGHER * self.highest

    def take(self, age: float, scale: float, rate: float) -> None:
        """Note a step."""
        if self.is_high(scale * rate):
            self.highest, self.scale, self.age = scale * rate, scale, age

    def over(self, age: float, scale: float) -> bool:
        """Whether warmup is, at this age and scale."""
        steps = SETTLED_STEPS if scale >= 1.0 else SETTLED_BELOW
        old = age >= max(SETTLED_AGE * self.age, self.age + steps)
        back = scale >= RECOVERED * self.scale or age >= max(PATIENCE * self.age, PATIENCE_STEPS)
        return old and back
