"""Learning-rate warmup without `warmup_steps`."""

from warmctl.curvature import sharpness as sharpness
from warmctl.eigen import EigenResult as EigenResult, lanczos as lanczos, power_iteration as power_iteration
from warmctl.history import History as History
from warmctl.operators import HessianOperator as HessianOperator, ScaledOperator as ScaledOperator
from warmctl.optimizer import AdaptiveWarmup as AdaptiveWarmup
from warmctl.plotting import plot as plot
from warmctl.update_rules import (
    UpdateRule as UpdateRule,
    register_update_rule as register_update_rule,
    stability_threshold as stability_threshold,
)

__version__ = "0.1.0"
