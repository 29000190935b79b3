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
    from warmctl.optimizer import AdaptiveWarmup as AdaptiveWarmup
    from warmctl.record.history import History as History
    from warmctl.record.plotting import plot as plot
    from warmctl.stability.update_rules import (
        UpdateRule as UpdateRule,
        register_update_rule as register_update_rule,
        stability_threshold as stability_threshold,
    )

__version__ = "0.1.0"

_HOMES = {
    "curvature.eigen": ("EigenResult", "lanczos", "power_iteration"),
    "curvature.operators": ("HessianOperator",),
    "curvature.scaled": ("ScaledOperator",),
    "curvature.sharpness": ("sharpness",),
    "optimizer": ("AdaptiveWarmup",),
    "record.history": ("History",),
    "record.plotting": ("plot",),
    "stability.update_rules": ("UpdateRule", "register_update_rule", "stability_threshold"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'warmctl' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"warmctl.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
