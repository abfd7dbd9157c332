"""`rollouts`: rows that the student writes while it is trained (on-policy distillation)."""

from pydantic import Field

from distillkit.config.data import DatasetSource
from distillkit.config.errors import KeyProblem
from distillkit.config.section import Section


class RolloutsConfig(Section):
    """The student continues prompts, and the teacher's distribution on what it wrote is what it learns from."""

    prompts: DatasetSource = Field(
        description="what is continued: repo_id or disk_path. Of messages all up to the last answer, of the column "
        "prompt the whole, of a text its first prompt_tokens"
    )
    text_field: str = Field("text", description="column of prompts that holds texts")
    prompt_tokens: int = Field(64, gt=0, description="tokens of a text that are continued, its first")
    share: float = Field(1.0, gt=0, le=1, description="of the training rows, those that are written; the others stay")
    max_new_tokens: int = Field(128, gt=0, description="tokens that the student writes at most after a prompt")
    temperature: float = Field(1.0, gt=0, description="temperature of the sampling")
    batch_size: int = Field(32, gt=0, description="prompts that are continued at a time")
    seed: int = Field(42, ge=0, description="seed of the order of the prompts and of the sampling")


def check_rollouts(
    rollouts: RolloutsConfig, sequence_length: int, teacher: str, functions: list[str], *, divided: bool
) -> None:
    """Raises `KeyProblem` where a run, whose losses have these functions, cannot learn from what its student writes."""
    if teacher == "dataset":
        raise KeyProblem("rollouts", "a captured teacher has no outputs for what the student writes; use a live one")
    if divided:
        raise KeyProblem("rollouts", "a student that is divided cannot write; remove parallel, or rollouts")
    if "cross_entropy" in functions:
        raise KeyProblem(
            f"loss_functions[{functions.index('cross_entropy')}].function",
            "cross_entropy would take what the student writes for right (rollouts); use reverse_kl, jsd or kl",
        )
    if rollouts.max_new_tokens >= sequence_length:
        raise KeyProblem(
            "rollouts.max_new_tokens", f"leaves no room for a prompt in a row of {sequence_length} tokens; lower it"
        )
