"""The feedback law as it stands, to be read first: its numbers written out, no options, nothing to save, no words.

`Controller` is this law with names for the numbers, options, a state that resumes and reasons for the log; it says what
each rule is for. Nothing calls the law here but the tests, which hold the two together, equal to the last bit.
"""

from __future__ import annotations

import math

from warmctl.control.controller import Reading


class ReferenceLaw:
    """Target 0.8, guard after warmup. `step` takes what `Controller.update` takes; it returns scale and phase."""

    def __init__(self) -> None:
        self.phase, self.scale, self.shortening = "warmup", 0.01, 1.0
        self.age = self.readings = self.slopes = 0
        self.curvature, self.change = 0.0, 0.0  # r and RRC over the rate; 0: unknown
        self.share, self.tolerant, self.scale_measured, self.scale_settled = 1.0, False, 0.0, 1.0
        self.mean = self.square = 0.0  # of e
        self.turned, self.high_scale = False, 0.0
        self.high, self.high_age, self.scale_high = 0.0, 0, 0.0

    def step(
        self, rate: float, reading: Reading | None, e: float, surprise: float, persistence: float
    ) -> tuple[float, str]:
        self.age += 1
        self.shortening = min(1.0, 1.4 * self.shortening)
        self.slope(e)
        failed = reading is not None and not math.isfinite(reading.ratio)
        if reading is not None and not failed:
            self.readings += 1
            self.read(reading, rate)
        if (self.readings or self.change) and not failed:
            self.move(rate, reading, persistence)
        allowed = 2.0 if self.readings and self.scale > 0.1 * self.carried(rate) else 4.0
        if surprise > allowed:
            self.shortening = min(self.shortening, max(allowed / surprise, 0.1))
        if self.phase == "warmup" and self.ended(rate):
            self.phase, self.scale_settled = "guard", self.scale
        return self.scale * self.shortening, self.phase

    def changed(self, change: float, rate: float) -> None:
        """RRC of the step just made."""
        if math.isnan(change):
            return
        now = min(change, 1e6) / rate
        if now > 0.0:
            before = self.change or now
            self.change = math.sqrt(before * max(now, 0.001 * before))
        self.scale_measured = self.scale

    def slope(self, e: float) -> None:
        if not math.isnan(e):
            self.slopes += 1
            weight = 0.1 if self.slopes > 1 else 1.0
            self.mean += weight * (e - self.mean)
            self.square += weight * (e * e - self.square)

    def read(self, reading: Reading, rate: float) -> None:
        before, now = self.curvature, max(reading.ratio, 0.0) / rate
        rising = self.readings == 1 or (now >= before and not (reading.noisy and before > 0.0))
        now = now if rising else math.sqrt(before * max(now, 0.01 * before))
        averaged = reading.noisy and self.readings > 1
        share = math.sqrt(self.share * reading.share) if averaged else reading.share
        if not (reading.distress and now * self.share < before * share):
            self.curvature, self.share, self.tolerant = now, share, reading.tolerant

    def carried(self, rate: float) -> float:
        """The scale that holds the ratio at target."""
        return 0.8 * self.share / max(self.curvature * rate, 1e-30) if self.readings else math.inf

    def significance(self) -> float:
        return self.mean / math.sqrt(self.square) if self.square > 0.0 else 0.0

    def certainty(self) -> float:
        return self.significance() * (1.0 - math.exp(-self.slopes / 15.0))

    def move(self, rate: float, reading: Reading | None, persistence: float) -> None:
        aged = self.age / max(self.age - 1, 1)
        cap = 0.5 / persistence + 0.4 * max(0.0, self.certainty() - 0.5) / 0.5
        bearable = cap / max(self.change * rate, 1e-30)
        bearable = bearable if self.phase == "warmup" else min(bearable, self.scale_settled)
        carried, moves = self.carried(rate), self.change * (self.scale * rate) * persistence >= 0.13
        if self.phase == "warmup" and moves and self.age > 3 and self.mean < 0.0:
            self.turned = True
        ceiling = min(1.0, carried, bearable)
        if reading is not None and self.readings == 1 and not self.change and self.phase == "warmup":
            self.scale = max(min(ceiling, 0.002 / max(reading.relative_update, 1e-30)), 1e-5)
        elif carried * (1.25 if self.tolerant else 1.0) < self.scale:
            self.scale = max(carried, 1e-5)
        elif 1.3 * bearable < self.scale:
            self.scale = max(0.8 * self.scale, bearable, 1e-5)
        elif self.phase == "warmup" and self.turned and self.certainty() < -0.7:
            self.scale = self.high_scale = max(self.scale / aged, 1e-5)
        elif ceiling > self.scale:
            self.scale = max(
                self.scale, min(ceiling, self.scale * self.growth(rate, persistence), 4.0 * self.scale_measured)
            )
        if reading is not None:
            self.scale_measured = self.scale
        self.high_scale = max(self.high_scale, self.scale)

    def growth(self, rate: float, persistence: float) -> float:
        if self.phase != "warmup":
            return 1.1
        aged = self.age / max(self.age - 1, 1)
        change = self.change * (self.scale * rate) * persistence
        growth = 2.0
        if not self.change or change >= 0.13 or self.turned:
            growth = min(2.0, math.exp(0.6 * max(0.0, self.significance())))
            if change < 0.35:
                growth = max(growth, aged if self.mean >= 0.0 else math.sqrt(aged))
        growth = min(growth, float(aged ** (2.0 if self.turned else 4.0)))
        returning = self.scale < self.high_scale and self.significance() > -0.5
        return max(growth, 1.1) if returning else growth

    def ended(self, rate: float) -> bool:
        if not (self.readings or self.change):
            return self.age >= 1000
        if self.scale * rate >= 1.1 * self.high:
            self.high, self.scale_high, self.high_age = self.scale * rate, self.scale, self.age
        old = self.age >= max(1.5 * self.high_age, self.high_age + (20 if self.scale >= 1.0 else 100))
        return old and (self.scale >= 0.9 * self.scale_high or self.age >= max(4.0 * self.high_age, 200))
