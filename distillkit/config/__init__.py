"""The YAML of a run: one pydantic model per section, each key documented there. Imports no torch."""

from distillkit.config.data import DatasetConfig as DatasetConfig
from distillkit.config.data import DatasetSource as DatasetSource
from distillkit.config.errors import UserError as UserError
from distillkit.config.losses import LossConfig as LossConfig
from distillkit.config.phases import PhaseConfig as PhaseConfig
from distillkit.config.readiness import check_ready as check_ready
from distillkit.config.resolve import Phase as Phase
from distillkit.config.resolve import Run as Run
from distillkit.config.resolve import load_run as load_run
from distillkit.config.resolve import resolve as resolve
from distillkit.config.run import RunConfig as RunConfig
from distillkit.config.run_evaluation import RunEvaluationConfig as RunEvaluationConfig
from distillkit.config.student import InitializationConfig as InitializationConfig
from distillkit.config.student import StudentConfig as StudentConfig
from distillkit.config.teacher import DatasetTeacherConfig as DatasetTeacherConfig
from distillkit.config.teacher import HFTeacherConfig as HFTeacherConfig
