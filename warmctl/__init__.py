"""Learning-rate warmup without `warmup_steps`.

Names are imported when they are first asked for: the command line looks at records without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from warmctl.curvature.eigen import (
        EigenResult as EigenResult,
        lanczos as lanczos,
        power_iteration as power_iteration,
    )
    from warmctl.curvature.operators import HessianOperator as HessianOperator
    from warmctl.curvature.scaled import ScaledOperator as ScaledOperator
    from warmctl.curvature.sharpness import sharpness as sharpness
    from warmctl.diagnosis.diagnosis import Diagnosis as Diagnosis
    from warmctl.diagnosis.verdict import diagnose as diagnose
    from warmctl.follow.batch_norm import BatchNormMomentum as BatchNormMomentum
    from warmctl.follow.difficulty import Difficulty as Difficulty
    from warmctl.follow.dither import Dither as Dither
    from warmctl.follow.easy_first import EasyFirst as EasyFirst
    from warmctl.follow.follower import Follower as Follower
    from warmctl.follow.momentum import Momentum as Momentum
    from warmctl.follow.sam import SAMRadius as SAMRadius
    from warmctl.follow.unfreezing import Unfreezing as Unfreezing
    from warmctl.follow.vitals import Vitals as Vitals
    from warmctl.follow.weight_decay import WeightDecay as WeightDecay
    from warmctl.optimizer import AdaptiveWarmup as AdaptiveWarmup
    from warmctl.planning.plan import plan as plan
    from warmctl.planning.rate_range import RateRange as RateRange, rate_range as rate_range
    from warmctl.planning.reference import ReferenceRun as ReferenceRun
    from warmctl.planning.report import Plan as Plan
    from warmctl.planning.warmup import ExponentialFall as ExponentialFall
    from warmctl.record.history import History as History
    from warmctl.record.plotting import plot as plot
    from warmctl.record.schedule import RecordedWarmup as RecordedWarmup
    from warmctl.stability.update_rules import (
        UpdateRule as UpdateRule,
        register_update_rule as register_update_rule,
        stability_threshold as stability_threshold,
    )

__version__ = "0.2.0"

_HOMES = {
    "curvature.eigen": ("EigenResult", "lanczos", "power_iteration"),
    "curvature.operators": ("HessianOperator",),
    "curvature.scaled": ("ScaledOperator",),
    "curvature.sharpness": ("sharpness",),
    "diagnosis.diagnosis": ("Diagnosis",),
    "diagnosis.verdict": ("diagnose",),
    "follow.batch_norm": ("BatchNormMomentum",),
    "follow.difficulty": ("Difficulty",),
    "follow.dither": ("Dither",),
    "follow.easy_first": ("EasyFirst",),
    "follow.follower": ("Follower",),
    "follow.momentum": ("Momentum",),
    "follow.sam": ("SAMRadius",),
    "follow.unfreezing": ("Unfreezing",),
    "follow.vitals": ("Vitals",),
    "follow.weight_decay": ("WeightDecay",),
    "optimizer": ("AdaptiveWarmup",),
    "planning.plan": ("plan",),
    "planning.rate_range": ("RateRange", "rate_range"),
    "planning.reference": ("ReferenceRun",),
    "planning.report": ("Plan",),
    "planning.warmup": ("ExponentialFall",),
    "record.history": ("History",),
    "record.plotting": ("plot",),
    "record.schedule": ("RecordedWarmup",),
    "stability.update_rules": ("UpdateRule", "register_update_rule", "stability_threshold"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'warmctl' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"warmctl.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
