"""Divergence of a student from its teacher, benchmarks, long-context retrieval, speed, and samples of text."""

from distillkit.evaluation.divergence import Divergence as Divergence
from distillkit.evaluation.divergence import measure_divergence as measure_divergence
from distillkit.evaluation.evaluate import evaluate as evaluate
from distillkit.evaluation.samples import Sample as Sample
from distillkit.evaluation.samples import check_prompts as check_prompts
from distillkit.evaluation.samples import generate_samples as generate_samples
