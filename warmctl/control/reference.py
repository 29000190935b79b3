"""The feedback law as it stands, to be read first: its numbers written out, no options, nothing to save, no words.

`Controller` is this law with names for the numbers, options, a state that resumes and reasons for the log; it says what
each rule is for. Nothing calls the law here but the tests, which hold the two together, equal to the last bit.
"""

from __future__ import annotations

import math

from warmctl.control.controller import Reading


class ReferenceLaw:
    """Target 0.5, guard after warmup. `step` takes what `Controller.update` takes; it returns scale and phase."""

    def __init__(self) -> None:
        self.phase, self.scale, self.shortening = "warmup", 0.01, 1.0
        self.age = self.probes = self.readings = 0
        self.curvature = self.update = 0.0  # ratio and relative update over the rate, by the last reading
        self.share, self.tolerant, self.scale_read, self.scale_settled = 1.0, False, 0.0, 1.0
        self.high, self.high_scale, self.high_age, self.high_probes = 0.0, 0.0, 0, 0

    def step(self, rate: float, reading: Reading | None, losing: bool, surprise: float) -> tuple[float, str]:
        self.age += 1
        self.shortening = min(1.0, 1.4 * self.shortening)
        self.probes += reading is not None
        failed = reading is not None and not math.isfinite(reading.ratio)
        if reading is not None and not failed:
            self.readings += 1
            self.read(reading, rate)
        if self.readings and not failed:
            self.move(rate, reading is not None, losing)
        allowed = 2.0 if self.readings and self.scale > 0.1 * self.carried(rate) else 4.0
        if surprise > allowed:
            self.shortening = min(self.shortening, max(allowed / surprise, 0.1))
        if self.phase == "warmup" and self.ended(rate, losing and not failed):
            self.phase, self.scale_settled = "guard", self.scale
        return self.scale * self.shortening, self.phase

    def carried(self, rate: float) -> float:
        """The scale that holds the ratio at target."""
        return 0.5 * self.share / max(self.curvature * rate, 1e-30)

    def read(self, reading: Reading, rate: float) -> None:
        before, now = self.curvature, max(reading.ratio, 0.0) / rate
        averaged = reading.noisy and self.readings > 1
        rising = now >= before and not (reading.noisy and before > 0.0)
        self.curvature = now if rising else math.sqrt(before * max(now, 0.01 * before))
        self.share = math.sqrt(self.share * reading.share) if averaged else reading.share
        self.update, self.tolerant = reading.relative_update / rate, reading.tolerant

    def move(self, rate: float, probed: bool, losing: bool) -> None:
        carried, warming = self.carried(rate), self.phase == "warmup"
        ramp = 0.002 * self.age / max(self.update * rate, 1e-30)
        ceiling = min(1.0, carried, ramp if warming else self.scale_settled)
        if probed and warming and self.readings == 1:
            self.scale = max(ceiling, 1e-4)
        elif carried * (2.0 if self.tolerant else 1.0) < self.scale:
            self.scale = max(carried, 1e-4)
        elif ceiling > self.scale and not losing:
            power = max(1.0, 2.0 * math.log10(carried / self.scale))
            grown = self.scale * (self.age / (self.age - 1)) ** power
            self.scale = max(self.scale, min(ceiling, grown, 4.0 * self.scale_read))
        if probed:
            self.scale_read = self.scale

    def ended(self, rate: float, losing: bool) -> bool:
        if self.readings and self.scale * rate >= 1.1 * self.high:
            self.high, self.high_scale, self.high_age, self.high_probes = (
                self.scale * rate, self.scale, self.age, self.probes,
            )  # fmt: skip
        elif losing:
            self.high_age = self.age
        if not self.readings:
            return self.age >= 1000
        old = self.age >= max(1.5 * self.high_age, self.high_age + (20 if self.scale >= 1.0 else 100))
        back = self.scale >= 0.9 * self.high_scale or self.age >= max(4.0 * self.high_age, 200)
        return old and back and self.probes - self.high_probes >= 2
