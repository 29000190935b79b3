"""What every source of the loss offers a probe: the step's loss, in a form that can be evaluated again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from warmctl import distributed
from warmctl.loss.random_state import RandomState
from warmctl.loss.ranks import Ranks
from warmctl.loss.replay import Closure, Replay
from warmctl.state import Allowed, check
from warmctl.vectors import Vector

EXACT, CLOSE, NEVER, UNTRIED = 1.0, 0.5, 0.0, -1.0
"""How a repeated gradient compares with that of the step: the same; the same but for clipping or a small term; not
at all, and then the loss cannot be evaluated again; or not known before the first probe. Below that: each time that the
comparison failed for another reason, which may pass, up to `TRIES` times."""
TRIES = 3
NOT_SAME = (
    "before this run was resumed, evaluating the loss again did not give the same. Call opt.step(closure) with "
    "a batch drawn outside of the closure, or give AdaptiveWarmup a loss_fn and call opt.observe(batch) before step."
)


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step, to be measured on.

    Attributes:
        replay: evaluates it again.
        gradient: at the present parameters, if it is at hand: that saves the probe one evaluation.
        value: of the loss, where the step's own is known.
        weight: how often it is in the gradient of the step: more than once where micro-batches are accumulated.
    """

    replay: Replay
    gradient: Vector | None = None
    weight: float = 1.0
    value: Tensor | None = None


class Source(Protocol):
    """One way from a user's loop to its loss. `ready` costs nothing; `step_loss` at most three evaluations."""

    @property
    def ready(self) -> bool:
        """Whether there is a loss of the coming step here that may be evaluated again."""
        ...

    def step_loss(self, params: list[Tensor], replays: Replays) -> StepLoss | None:
        """That loss; None, with `Verdict.why_not` set, if evaluating it again did not give the same."""
        ...

    def forget(self) -> None:
        """The step was made."""
        ...


@dataclass
class Verdict:
    """What the first probe found out about evaluating the loss again, for every later one.

    Attributes:
        repeats: one of `EXACT`, `CLOSE`, `NEVER`, `UNTRIED`; less than that by 1 for each comparison that failed.
        why_not: what to tell the user.
    """

    repeats: float = UNTRIED
    why_not: str = "there is no loss that can be evaluated again"

    @property
    def untried(self) -> bool:
        """Whether the gradients have not been compared yet."""
        return self.repeats <= UNTRIED

    @property
    def failures(self) -> float:
        """How often the comparison failed."""
        return max(UNTRIED - self.repeats, 0.0)

    def fail(self, why: str) -> None:
        """The comparison failed, for a reason that may pass: it is made again at the next probe."""
        self.repeats, self.why_not = UNTRIED - min(self.failures + 1, TRIES), why

    def state_values(self) -> list[float]:
        return [self.repeats]

    def check_state_values(self, values: list[float]) -> None:
        failed = (UNTRIED - count for count in range(TRIES + 1))
        check(values, {"repeats": Allowed(among=(*failed, NEVER, CLOSE, EXACT))})

    def load_state_values(self, values: list[float]) -> None:
        (self.repeats,) = values
        if self.repeats == NEVER:
            self.why_not = NOT_SAME


class Replays:
    """Makes replays for one probe after the other and counts how often they evaluate the loss.

    Attributes:
        spent: evaluations since it was last set to 0: what a probe that failed has cost.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.spent = model, 0
        self.ranks = Ranks(model)

    def of(self, closure: Closure, params: list[Tensor], random_state: RandomState | None, own: bool = False) -> Replay:
        """Args: own: the closure asks for its backward pass by `run_backward`."""

        def counted() -> Any:
            self.spent += 1
            return closure()

        return Replay(counted, params, self.model, random_state, distributed.averager(params), own, self.ranks)
