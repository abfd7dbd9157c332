"""How far a student is from its teacher, what each of them can do and at what price, and what a student writes."""

from distillkit.evaluation.divergence import Divergence as Divergence
from distillkit.evaluation.divergence import measure_divergence as measure_divergence
from distillkit.evaluation.evaluate import evaluate as evaluate
from distillkit.evaluation.samples import Sample as Sample
from distillkit.evaluation.samples import generate_samples as generate_samples
