"""Learning-rate warmup without `warmup_steps`."""

from warmctl.curvature.eigen import EigenResult as EigenResult, lanczos as lanczos, power_iteration as power_iteration
from warmctl.curvature.operators import HessianOperator as HessianOperator
from warmctl.curvature.scaled import ScaledOperator as ScaledOperator
from warmctl.curvature.sharpness import sharpness as sharpness
from warmctl.diagnose.diagnosis import Diagnosis as Diagnosis
from warmctl.diagnose.verdict import diagnose as diagnose
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
from warmctl.plan.plan import plan as plan
from warmctl.plan.rate_range import RateRange as RateRange, rate_range as rate_range
from warmctl.plan.reference import ReferenceRun as ReferenceRun
from warmctl.plan.report import Plan as Plan
from warmctl.plan.warmup import ExponentialFall as ExponentialFall
from warmctl.record.history import History as History
from warmctl.record.plotting import plot as plot
from warmctl.record.schedule import RecordedWarmup as RecordedWarmup
from warmctl.stability.update_rules import (
    UpdateRule as UpdateRule,
    register_update_rule as register_update_rule,
    stability_threshold as stability_threshold,
)

__version__ = "0.1.0"
