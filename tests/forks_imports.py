"""What the process imports from which others are forked (`tests.forks`)."""

import gc
import os

import gguf  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

import distillkit.capture.packing
import distillkit.capture.run
import distillkit.evaluation
import distillkit.planning
import distillkit.reporting
import distillkit.training  # noqa: F401
from distillkit.reporting import training_section
from tests.pictures import drawn, drawn_once

os.fsync = lambda descriptor: None
training_section.line_chart = drawn_once
drawn()

gc.collect()
gc.freeze()  # Trainer collects garbage at the start of each phase; what is here is none
