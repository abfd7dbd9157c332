"""Training a student: what is frozen, in which precision, the trainer, its checkpoints, and the run as a whole."""

from distillkit.training.run import distill as distill
