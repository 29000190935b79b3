"""Measuring the stability ratio at the full scheduled rate: one number a probe, with its residual and its cost.

The estimator measures and does not decide. It builds D^½ H D^½ from the optimizer's state and the gradient of the
coming step, measures along the eigenvector tracked so far, and keeps nothing but that unit vector between probes.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from warmctl import distributed
from warmctl.curvature.eigen import WARM_START_NOISE, EigenResult, lanczos, power_iteration
from warmctl.curvature.operators import HessianOperator
from warmctl.curvature.scaled import ScaledOperator
from warmctl.curvature.tracking import power_step, ritz_step
from warmctl.loss.replay import Replay
from warmctl.stability.measurement import Measurement
from warmctl.stability.step_scale import StepScale
from warmctl.vectors import Vector, add_, dense_gradient, local, locals_of, random_like
from warmctl.warning import first_line

log = logging.getLogger("warmctl")

AGREEMENT = 0.1
"""Relative difference of the two Rayleigh quotients up to which the cheaper one, by finite difference, is used."""
STEP = 1e-3
"""Relative step of the probe's finite differences, ten times `finite_difference.STEP`. A short step across the kinks of
a ReLU is nearly all noise; a longer one is off where the loss is far from quadratic, as a transformer's is at first."""
INCOHERENT = 0.2
"""Weight of a relative update without momentum: successive ones point apart. Chosen by trial, not derived."""
LARGEST_SLACK = 100.0
"""Most by which the edge of a self-limiting rule is taken to be beyond its eigenvalue's."""
LONGEST = 2.0
"""Most that a saved eigenvector, of length 1 before it was rounded to another type, may have."""
ALIKE, UNCLIPPED = 0.99, 1e-3
"""Cosine from which on two gradients differ in length alone; and relative difference of lengths that is rounding."""
Inner = Callable[[Vector, Vector], float]
ESTIMATORS = {"lanczos": lanczos, "power": power_iteration}


class SharpnessEstimator(StepScale):
    """Tracks r₁ of an optimizer with a known update rule.

    Args:
        optimizer: the wrapped optimizer, read only.
        hvp: method of the Hessian-vector product, as in `HessianOperator`.
        estimator: "lanczos" or "power".
        steps: products a probe; twice as many from cold.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, hvp: str, estimator: str, steps: int) -> None:
        super().__init__(optimizer)
        self.method, self.solve, self.steps = hvp, ESTIMATORS[estimator], steps
        self.vector: Vector | None = None

    def measure(self, replay: Replay, gradient: Vector | None, seed: int, weight: float = 1.0) -> Measurement:
        """One probe on the loss of `replay`.

        Args:
            gradient: of that loss at the present parameters if it is at hand; saves one evaluation.
            seed: of Lanczos' random component.
            weight: how often that loss is in the gradient of the step.

        Cost: `steps` products. Memory: snapshot, D^½, one gradient and one vector a step, all given back but the
        eigenvector.
        """
        inner = distributed.inner_product(replay.params)
        extra = 0.0
        if self.method == "auto":
            if gradient is None:
                gradient, extra = replay.gradient()[1], 1.0
            self.method, spent = self._choose(replay, gradient, inner)
            extra += spent
        with HessianOperator(replay, replay.params, self.method, gradient=gradient, inner=inner, step=STEP) as operator:
            if gradient is None and operator.method == "finite_difference":
                operator.present_gradient()  # which its products begin with
            seen = self._seen(replay.params, gradient or operator.gradient, weight, inner)
            found = self.measure_on(operator, seed, seen).times(seen)
        if self.rule is not None and self.rule.preconditioner is None:
            found = replace(found, sharpness=found.sharpness * weight / seen)  # of the loss itself
        return replace(found, cost=found.cost + extra)

    def _seen(self, params: Sequence[Tensor], gradient: Vector | None, weight: float, inner: Inner) -> float:
        """The gradient of the step over that of the loss: one that is clipped to c times itself makes a step on the
        loss times c.
        """
        if gradient is None:
            return weight
        step = [dense_gradient(p) for p in params]
        along, square = inner(step, gradient), inner(gradient, gradient)
        alike = along > 0.0 and along >= ALIKE * math.sqrt(square * inner(step, step))
        return along / square if alike and abs(along / square - weight) > UNCLIPPED * weight else weight

    def _choose(self, replay: Replay, gradient: Vector, inner: Inner) -> tuple[str, float]:
        """Finite differences, unless forward passes round to less than float32 and an exact product says otherwise.

        In full precision the two differ at the kinks of a ReLU alone. There the step of the optimizer crosses kinks
        too, and an exact product, blind to them, is no nearer to the truth for more than twice the price. Said once.
        """
        if distributed.is_sharded(replay.params):
            log.info("hvp: finite differences; the parameters are sharded")
            return "finite_difference", 0.0
        spent = 0.0
        if not replay.inspected:  # autocast shows in a forward pass
            replay.gradient()
            spent = 1.0
        if replay.precision <= torch.finfo(torch.float32).eps:
            log.info("hvp: finite differences; the model computes in full precision")
            return "finite_difference", spent
        root = self.scaling(replay.params)[0]
        direction = list(torch._foreach_mul(self._start(root, replay.params, inner, 0), root))
        with (
            HessianOperator(
                replay, replay.params, "finite_difference", gradient=gradient, inner=inner, step=STEP
            ) as cheap,
            HessianOperator(replay, replay.params, "double_backward", inner=inner) as exact,
        ):
            try:
                with replay.on_every_rank():
                    # Where there is curvature: along the gradient there may be next to none.
                    image = exact.matvec(direction)
                    truth = exact.matvec(image)
                    size = math.sqrt(inner(truth, truth))
            except Exception as error:
                size, failure = math.nan, first_line(error)
            else:
                failure = "it was not finite"
            if not math.isfinite(size):
                log.info("hvp: finite differences; the exact product failed (%s)", failure)
                return "finite_difference", spent + exact.cost
            bend = inner(image, truth)
            gap = abs(inner(image, cheap.matvec(image)) - bend) / max(abs(bend), 1e-30)
        method = "double_backward" if gap > AGREEMENT and size > 0.0 else "finite_difference"
        log.info("hvp: %s; along one direction a finite difference is %.2g off the exact quotient", method, gap)
        return method, spent + cheap.cost + exact.cost

    def measure_on(self, operator: HessianOperator, seed: int, weight: float = 1.0) -> Measurement:
        """One probe on a Hessian that is there already, `weight` times as large in the step; decay is not."""
        params = operator.params
        root, shift, sign = self.scaling(params)
        shift = [decay / weight for decay in shift]
        relative_update = self._relative_update(params, root)
        result, along = self._solve(ScaledOperator(operator, root, shift, sign), params, seed)
        self.vector = result.eigenvector if math.isfinite(result.eigenvalue) else None
        rate, threshold = self.reference()
        share = self.momentum_share()
        ratio = result.eigenvalue * share
        noisy = self.self_limiting() and math.isfinite(along)
        slack = _step_slack(result.eigenvalue, along) if noisy else 1.0
        return Measurement(
            ratio=ratio,
            residual=result.residual / max(abs(result.eigenvalue), 1e-30),
            sharpness=ratio * threshold / rate if rate > 0 else math.nan,
            threshold=threshold,
            hvps=result.hvps,
            cost=operator.cost,
            reason="" if math.isfinite(result.eigenvalue) else "the probe was not finite",
            share=share * slack,
            relative_update=relative_update,
            noisy=noisy,
        )

    def _solve(self, scaled: ScaledOperator, params: Sequence[Tensor], seed: int) -> tuple[EigenResult, float]:
        """The pair, and the quotient along the coming step where it was measured, else nan.

        From cold, twice the steps. Warm, two products, on directions that this batch's Hessian did not choose.
        """
        cold = self.vector is None or [v.shape for v in self.vector] != [r.shape for r in scaled.root]
        if self.solve is lanczos and self.steps == 2 and not cold:
            vector, self.vector = self.vector, None
            assert vector is not None
            return ritz_step(scaled, vector, lambda: self._update(params, scaled.root))
        start = self._start(scaled.root, params, scaled.inner, seed)
        if self.steps == 1:
            return power_step(scaled, start), math.nan
        steps = 2 * self.steps if cold else self.steps
        return self.solve(scaled, start=start, steps=steps, tol=0.0, noise=0.0), math.nan

    @property
    def has_vector(self) -> bool:
        """Whether there is an eigenvector."""
        return self.vector is not None

    def vector_of(self, params: list[Tensor]) -> dict[Tensor, Tensor]:
        """This process's part of the last eigenvector, by parameter; zeros if there is none of these shapes."""
        vector, shapes = self.vector, locals_of(params)
        if vector is None or [v.shape for v in vector] != [t.shape for t in shapes]:  # frozen or thawed since
            vector = [torch.zeros_like(t) for t in shapes]
        return dict(zip(params, vector, strict=True))

    def load_vector(self, vector: Sequence[Tensor | None], params: Sequence[Tensor]) -> None:
        """Continue from a saved eigenvector; a gap is zero, and zeros alone mean that there was none.

        Raises: ValueError for one that is not finite, or longer than a unit vector. Nothing is changed then.
        """
        saved = [*vector, *[None] * (len(params) - len(vector))]
        parts = [
            torch.zeros_like(local(p.detach())) if v is None else local(v).to(local(p), copy=True)
            for v, p in zip(saved, params, strict=True)
        ]
        square = distributed.inner_product(params)(parts, parts)
        if not square <= LONGEST**2:
            raise ValueError(f"warmctl_vector has squared length {square:g} in the checkpoint, it must be 1")
        self.vector = parts if square > 0.0 else None

    def _start(self, root: Vector, params: Sequence[Tensor], inner: Inner, seed: int) -> Vector:
        """The last eigenvector and a little of the preconditioned gradient with random signs; at first its own signs.

        Noise with the gradient's magnitudes is zero in rows that the loss does not reach, where an adaptive D is
        enormous and plain noise would drown a finite difference.
        """
        update = self._update(params, root)
        if self.vector is None or [v.shape for v in self.vector] != [r.shape for r in root]:
            return update
        length = math.sqrt(inner(update, update))
        torch._foreach_mul_(update, [noise.sign_() for noise in random_like(root, seed)])
        return add_(self.vector, update, WARM_START_NOISE / length if length > 0 else 0.0)

    def _update(self, params: Sequence[Tensor], root: Vector) -> Vector:
        """D^½ g: the direction of the coming step, without momentum, in the coordinates of D^½ H D^½."""
        return list(torch._foreach_mul([dense_gradient(p) for p in params], root))

    def _relative_update(self, params: Sequence[Tensor], root: Vector) -> float:
        """Median of ‖η P⁻¹ g‖ / ‖θ‖ over the weight matrices that move; 0 if there is none.

        A matrix that is zero, as half of those of LoRA at the start, counts with the norm √rows of a usual one.
        """
        matrices = [(p, r) for p, r in zip(params, root, strict=True) if p.dim() > 1 and p.numel()]
        if not matrices:
            return 0.0
        matrix_params, matrix_root = [p for p, _ in matrices], [r for _, r in matrices]
        updates = self._update(matrix_params, matrix_root)
        torch._foreach_mul_(updates, matrix_root)
        changes = distributed.norms(matrix_params, updates)
        sizes = distributed.norms(matrix_params, locals_of(matrix_params))
        usual = [size or math.sqrt(len(p)) for p, size in zip(matrix_params, sizes, strict=True)]
        ratios = [change / size for change, size in zip(changes, usual, strict=True) if change > 0.0]
        if not ratios:
            return 0.0
        _, threshold = self.reference()
        weight = INCOHERENT if self.self_limiting() else 1.0
        return statistics.median(ratios) * threshold * self.momentum_share() * weight


def _step_slack(eigenvalue: float, along: float) -> float:
    """(λ / quotient along the step)², at least 1.

    Without momentum, and with a P that takes in each gradient at once, a step past the edge is bounded and soon
    forgotten; what it does to the loss is the quotient ρ along it. Noisy gradients keep ρ far below λ; where the
    step points along the top eigenvector they are equal, and the edge is the eigenvalue's. ρ·(ρ/λ) is held at target.
    """
    if along * math.sqrt(LARGEST_SLACK) <= eigenvalue:
        return LARGEST_SLACK if eigenvalue > 0.0 else 1.0
    return max((eigenvalue / along) ** 2, 1.0)
