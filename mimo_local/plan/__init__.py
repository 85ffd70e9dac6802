"""Where every byte of a model would live on a machine, and how fast that would be.

`planner.plan` is the answer to everything; pure arithmetic but for `calibrations`, which keeps what
was measured. Knows no tensor, imports no torch. Called by cli, loading and doctor.
"""

from mimo_local.plan.planner import plan
from mimo_local.plan.types import Budget, Plan, Prediction, Row

__all__ = ["Budget", "Plan", "Prediction", "Row", "plan"]
