"""`evaluation` of a run: divergence from the teacher before and after training, and sampled continuations."""

from pydantic import Field

from distillkit.config.data import DatasetSource
from distillkit.config.section import Section


class RunEvaluationConfig(Section):
    """Divergence from the teacher on held-out text, and sampled continuations."""

    dataset: DatasetSource | None = Field(None, description="held-out text; dataset.eval_dataset by default")
    num_tokens: int = Field(16384, gt=0, description="tokens of held-out text that are measured")
    prompts: list[str] = Field(default=[], description="texts that the student continues after training")
    max_new_tokens: int = Field(64, gt=0, description="length of a continuation in tokens")
    temperature: float = Field(0.7, ge=0, description="sampling temperature; 0 takes the most probable token")
    top_p: float = Field(0.95, gt=0, le=1, description="sampling takes the tokens that make up this probability")
    seed: int = Field(0, ge=0, description="seed of the sampling")
