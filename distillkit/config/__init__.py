"""The YAML of a run: one pydantic model per section, in which each key is documented. Imports no torch.

The way of a run, from its file to what is trained:

1. `yaml_files` reads the file, merges it (`merging`) into the file that it `extends`, and applies the overrides of the
   command line. The result is plain data.
2. `run.RunConfig` checks that data against the sections: `data`, `losses`, `phases`, `student`, `teacher`,
   `run_evaluation`, `tokens` (budgets) and `training_args`. A mistake is a `UserError` that names the key (`errors`).
3. `resolve` makes a `Run` of the configuration: one or more `Phase`s, each with a whole configuration of its own.
4. `readiness` checks, before torch is imported, that files exist.

`capture`, `evaluate` and `synthetic` are the YAML of the commands of these names, read in the same way;
`evaluate_options` adds the options of the command line. `schema` makes JSON schemas of them all, for editors.
"""

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
from distillkit.config.teacher import ServerTeacherConfig as ServerTeacherConfig
