"""Schedules as data: who computes, sends and reduces what, in which order.

``check`` stays in :mod:`mpillm.schedules.check`, whose name it shares.
"""

from mpillm.schedules.check import PipelineReport, grid
from mpillm.schedules.pipeline import SCHEDULES, Action, PipelineSchedule, make_schedule

__all__ = ["SCHEDULES", "Action", "PipelineReport", "PipelineSchedule", "grid", "make_schedule"]
