"""`plan`: what a landscape and an optimizer allow, before the first step is made. Wiring alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Adamax, Optimizer

from warmctl.curvature.sharpness import rows_of
from warmctl.loss.no_trace import no_trace
from warmctl.loss.replay import Replay
from warmctl.planning import checks
from warmctl.planning.batch_size import largest_batch, scaled_rate, second_moment_steps
from warmctl.planning.double import double_of, first_rate, peak_rates, proportions, set_rates
from warmctl.planning.edge import loss_rises_from, measure_edge, sharpness_of
from warmctl.planning.reference import ReferenceRun
from warmctl.planning.report import Plan
from warmctl.planning.spectral import spectral_bound
from warmctl.planning.warmup import ExponentialFall, recorded_ratios, smallest_linear_warmup
from warmctl.record.history import History
from warmctl.stability.update_rules import update_rule
from warmctl.vectors import Vector
from warmctl.warning import first_line

TOL, STEPS = 1e-3, 100
"""Of the eigenvalues, as in `sharpness`."""

Figures = dict[str, Any]


def plan(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    optimizer: Optimizer,
    total_steps: int | None = None,
    batch_size: int | None = None,
    reference: Any = None,
    *,
    target: float = 1.0,
) -> Plan:
    """How far this landscape lets a learning rate go: measured now, on one batch, without a trace.

    Parameters, gradients, buffers, optimizer state, random streams and modes stay as they are, bit for bit. The
    model is used in its present mode.

    >>> plan(model, loss_fn, batch, torch.optim.SGD(model.parameters(), lr=10.0), total_steps=1000).warmup_steps > 0
    True

    Args:
        loss_fn: loss_fn(model, batch) -> scalar tensor.
        batch: what `loss_fn` takes. The larger it is, the less its sharpness overstates that of the whole loss.
        optimizer: with the peak rates that are meant, or with a scheduler that has written them into the groups as
            `initial_lr` or `max_lr`. An `AdaptiveWarmup` stands for the optimizer in it.
        total_steps: length of the run; where the sharpness is not known to fall, `warmup_steps` needs it.
        batch_size: rows a step of the run to come; the rows of `batch` if omitted.
        reference: what the batch-size formulas and `warmup_steps` refer to: a pair (rate, batch_size) that trains
            well, a record (`History`, rows or path), an `ExponentialFall`, or a `ReferenceRun` of these. If omitted,
            the rate that is set goes with the rows of `batch`, and the sharpness stays as it is.
        target: the stability ratio that a linear warmup has to stay below; 1 is the edge.

    Returns: a `Plan`; `print` it for a table with a line of advice for each figure.

    Cost: in gradient evaluations, some 2.4 a Hessian-vector product, 10 to 60 of them for each of two eigenvalues (one
    where nothing preconditions), and 5 to 20 forward passes; for the spectral bound one forward pass and some products
    with each layer. Memory: the optimizer's state twice, and a parameter-sized vector a product.

    Raises: TypeError or ValueError for arguments that cannot work, naming the argument. What cannot be measured is
    None in the plan, and `reasons` says why.
    """
    base = checks.optimizer(optimizer, model)
    checks.loss_function("plan(model, loss_fn, batch, optimizer)", loss_fn)
    checks.count("total_steps", total_steps)
    checks.count("batch_size", batch_size)
    if not 0 < target <= 1.5:
        raise ValueError(f"target must be in (0, 1.5], a fraction of the edge of stability at 1, got {target!r}")
    before = ReferenceRun.of(reference)
    rows = rows_of(batch)
    figures, reasons = _measured(model, loss_fn, batch, base)
    _warmup(figures, reasons, before, total_steps, target)
    _batch_size(figures, reasons, before, base, rows, batch_size)
    return Plan(
        optimizer=type(base).__name__,
        rows=rows,
        total_steps=total_steps,
        batch_size=batch_size if batch_size is not None else rows,
        target=float(target),
        reasons=reasons,
        **figures,
    )


def _measured(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, optimizer: Optimizer
) -> tuple[Figures, dict[str, str]]:
    """What is measured on the batch, and for what could not be: why."""
    params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    replay = Replay.of_loss(lambda: loss_fn(model, batch), params, module=model)
    rates = peak_rates(optimizer)
    peak = first_rate(rates)
    with no_trace(params, model):
        loss, gradient = replay.gradient()
        if not math.isfinite(loss):
            raise ValueError(f"the loss on batch is {loss}: there is no landscape to measure")
        for p, g in zip(params, gradient, strict=True):
            p.grad = g
        measured = rates if peak else proportions(rates)
        double = double_of(optimizer)
        set_rates(double, measured)
        figures, reasons = _by_curvature(replay, gradient, double, peak)
        try:
            forward, why = loss_rises_from(replay, gradient, loss, optimizer, measured)
        except Exception as error:
            forward, why = math.nan, f"the update could not be made on a copy: {first_line(error)}"
        figures["critical_rate_forward"] = None if math.isnan(forward) else forward
        if why:
            reasons["critical_rate_forward"] = why
    if figures["ratio"] is None and not math.isnan(forward):
        figures["ratio"] = peak / forward if forward else math.inf
        reasons["ratio"] = "by forward passes: the optimizer has no update rule"
    figures["spectral_bound"], why = spectral_bound(model, loss_fn, batch, params)
    if why:
        reasons["spectral_bound"] = why
    return {"rate": peak, **figures}, reasons


def _by_curvature(replay: Replay, gradient: Vector, double: Optimizer, peak: float) -> tuple[Figures, dict[str, str]]:
    """Sharpness, and threshold, ratio and critical rate of an optimizer that has a rule."""
    figures: Figures = dict.fromkeys(
        ("sharpness", "threshold", "ratio", "ratio_first_step", "critical_rate", "critical_rate_first_step")
    )
    figures["preconditioned"] = False
    rule = update_rule(double)
    name = type(double).__name__
    if rule is None:
        found = sharpness_of(replay, gradient, TOL, STEPS)
        why = f"no update rule is registered for {name}: see warmctl.register_update_rule"
        reasons = dict.fromkeys(("threshold", "critical_rate"), why)
        figures["sharpness"], residual = found.eigenvalue, found.residual / max(abs(found.eigenvalue), 1e-30)
        converged = found.converged
    else:
        edge, reasons = measure_edge(replay, gradient, double, tol=TOL, steps=STEPS, raw=True), {}
        # The double may have a rate of 1 in place of none: what is proportional to it is then 0.
        unit = first_rate([float(group["lr"]) for group in double.param_groups])
        critical = unit / edge.ratio if edge.ratio > 0 else math.inf
        if not math.isfinite(edge.ratio):
            why = "a Hessian-vector product was not finite"
            return figures, dict.fromkeys(("sharpness", "threshold", "ratio", "critical_rate"), why)
        figures |= {
            "sharpness": edge.sharpness,
            "threshold": edge.threshold,
            "ratio": edge.ratio * peak / unit,
            "ratio_first_step": edge.ratio * peak / unit / edge.share,
            "critical_rate": critical,
            "critical_rate_first_step": critical * edge.share,
            "preconditioned": rule.preconditioner is not None,
        }
        residual, converged = edge.residual, edge.converged
    if not converged:
        reasons["sharpness"] = f"not converged after {STEPS} products (relative residual {residual:.1g}): a lower bound"
    return figures, reasons


def _warmup(
    figures: Figures, reasons: dict[str, str], before: ReferenceRun, total_steps: int | None, target: float
) -> None:
    """The smallest linear warmup, for the course that the reference foretells."""
    figures["warmup_steps"] = None
    ratio, history = figures["ratio"], before.history
    if isinstance(history, History):
        ratios = recorded_ratios(history, figures["rate"])
        if total_steps is not None:  # beyond its end the record is taken to stay as it was there
            ratios = np.pad(ratios, (0, max(total_steps - len(ratios), 0)), mode="edge")[:total_steps]
        figures["warmup_steps"] = smallest_linear_warmup(ratios, target)
        return
    if ratio is None or not math.isfinite(ratio):
        reasons["warmup_steps"] = "there is no stability ratio to plan with"
        return
    course = history if isinstance(history, ExponentialFall) else ExponentialFall(1.0, 1.0)
    found = course.ratios(ratio, target, total_steps)
    if found is None:
        reasons["warmup_steps"] = (
            "the ratio is not known to fall to the target: lower the peak, give total_steps, or a reference that says "
            "how the sharpness falls"
        )
        return
    figures["warmup_steps"] = smallest_linear_warmup(found, target)


def _batch_size(
    figures: Figures,
    reasons: dict[str, str],
    before: ReferenceRun,
    optimizer: Optimizer,
    rows: int | None,
    batch_size: int | None,
) -> None:
    """Linear scaling, its wall, and the warmup that the second moment asks for."""
    figures |= dict.fromkeys(("scaled_rate", "largest_batch", "second_moment_steps"))
    rate = before.recorded_rate or figures["rate"]
    size = before.batch_size or rows
    to = batch_size or rows
    if size is None or to is None:
        why = "the rows of batch are not known: give batch_size, and reference=(rate, batch_size)"
        reasons |= dict.fromkeys(("scaled_rate", "largest_batch"), why)
        return
    figures["scaled_rate"] = scaled_rate(rate, size, to)
    if before.recorded_rate is None:
        reasons["scaled_rate"] = "no reference rate was given: from the peak that is set"
    critical = figures["critical_rate"] or figures["critical_rate_forward"]
    if critical is None or not rate:
        reasons["largest_batch"] = "it takes a critical rate, and a rate above 0 to scale"
    else:
        figures["largest_batch"] = largest_batch(rate, size, critical)
    beta2 = _beta2(optimizer)
    if beta2 is None:
        reasons["second_moment_steps"] = "the optimizer is not known to average squared gradients"
    else:
        figures["second_moment_steps"] = second_moment_steps(beta2, size, to, before.warmup_steps)


def _beta2(optimizer: Optimizer) -> float | None:
    """The memory of the squared gradient in the first group: β₂, or RMSprop's α; None for rules that average none."""
    rule, group = update_rule(optimizer), optimizer.param_groups[0]
    if rule is None or rule.preconditioner is None or isinstance(optimizer, Adamax):  # which keeps a maximum
        return None
    if "betas" in group:
        return float(group["betas"][1])
    return float(group["alpha"]) if "alpha" in group and "centered" in group else None
