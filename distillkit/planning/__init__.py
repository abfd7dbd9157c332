"""What a run would cost, said before it starts: parameters, tokens, memory, disk, time, and what is doubtful."""

from distillkit.planning.capture_plan import CapturePlan as CapturePlan
from distillkit.planning.capture_plan import plan_capture as plan_capture
from distillkit.planning.plan import plan_run as plan_run
from distillkit.planning.result import RunPlan as RunPlan
