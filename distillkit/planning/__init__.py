"""What a run would cost, before it starts: parameters, tokens, memory, disk, time, and what is doubtful."""

from distillkit.planning.capture_plan import plan_capture as plan_capture
from distillkit.planning.plan import plan_run as plan_run
from distillkit.planning.result import CapturePlan as CapturePlan
from distillkit.planning.result import RunPlan as RunPlan
from distillkit.planning.tables import capture_tables as capture_tables
from distillkit.planning.tables import run_tables as run_tables
