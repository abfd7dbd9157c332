"""Tasks of the LM Evaluation Harness, by its Python API; the scores equal those of its own command.

lm-eval is an optional dependency. A task is looked up by name among lm-eval's own and in folders that the user names; a
local one needs no network.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config.errors import UserError, did_you_mean
from distillkit.config.evaluate import BenchmarksConfig
from distillkit.evaluation.server import ServedModel
from distillkit.models.special_tokens import prompt_tokenizer


def run_benchmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: BenchmarksConfig,
    task: str,
    *,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of a task, or of each task of a group and, where it has scores of its own, of the group.

    Args:
        task: name of a task, a group or a tag, or the path of a task's YAML.
        limit: samples of each task; all by default.

    Returns: by name of the task, `metrics` (by name, and filter where there are several: `value`, `standard_error` or
        None), `samples`, `chance` (the accuracy of guessing; 0 where no option is chosen), `version`, and
        `higher_is_better` by the same names as `metrics` (None where it is unknown).

    Raises:
        UserError: lm-eval is not installed, a folder of `include_path` does not exist, or there is no such task.
    """
    tasks = check_tasks(settings, [task])
    from lm_eval.models.huggingface import HFLM

    with _without_noise():
        harness = HFLM(
            pretrained=model, tokenizer=prompt_tokenizer(tokenizer), backend="causal", batch_size=settings.batch_size
        )
        return _evaluate(harness, tasks, settings, task, limit)


def run_served_benchmark(
    served: ServedModel, settings: BenchmarksConfig, task: str, *, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """The same of a model that a server answers for, and `server`: where the scores come from.

    Raises `UserError` also where the server gives no log-probabilities of prompts and the task needs them.
    """
    tasks = check_tasks(settings, [task])
    from distillkit.evaluation.served_lm import ServedLM

    with _without_noise():
        scores = _evaluate(ServedLM(served, settings.seed), tasks, settings, task, limit)
    return {name: {**each, "server": served.about()} for name, each in scores.items()}


def _evaluate(
    harness: Any, tasks: Any, settings: BenchmarksConfig, task: str, limit: int | None
) -> dict[str, dict[str, Any]]:
    """harness: a model as lm-eval takes it. tasks: of `check_tasks`."""
    from lm_eval import simple_evaluate

    results = simple_evaluate(
        harness,
        tasks=[task],
        task_manager=tasks,
        num_fewshot=settings.num_fewshot,
        apply_chat_template=settings.apply_chat_template,
        limit=limit,
        log_samples=True,  # from which chance is known
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
    )
    return _scores(results)


def check_tasks(settings: BenchmarksConfig, names: Sequence[str]) -> Any:
    """lm-eval's tasks, among which are those of the names: of its own, or of the folders that the user names.

    Raises:
        UserError: lm-eval is not installed, a folder of `include_path` does not exist, or there is no such task.
    """
    for index, folder in enumerate(settings.include_path):
        if not os.path.isdir(folder):
            raise UserError(f"benchmarks.include_path[{index}]", f"no such folder: {folder!r}")
    try:
        import lm_eval.models.huggingface  # noqa: F401 -- also what it needs of others
    except ImportError as error:
        raise UserError(
            "benchmarks", f"lm-eval cannot be imported ({error}); install it with: pip install 'distillkit[eval]'"
        ) from error
    with _without_noise():
        tasks = _known_tasks(tuple(settings.include_path))
    for name in names:
        if name not in tasks.all_tasks and not os.path.isfile(name):
            raise UserError("benchmarks.tasks", f"lm-eval has no task {name!r}{did_you_mean(name, tasks.all_tasks)}")
    return tasks


@contextmanager
def _without_noise() -> Iterator[None]:
    """Nothing on stderr: lm-eval writes bars and warnings there, and so does the git that it starts for its version."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing, redirect_stderr(nothing):
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@cache
def _known_tasks(include_path: tuple[str, ...]) -> Any:
    """lm-eval's tasks and those in the folders. Indexing its 15,000 tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(include_path))


def _scores(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The part of lm-eval's results that a report needs, for everything that has a score."""
    scores = {}
    for name, row in results["results"].items():
        metrics, better = {}, {}
        for key, value in row.items():
            metric, separator, filtered = key.partition(",")
            if not separator or metric.endswith("_stderr"):
                continue
            error = row.get(f"{metric}_stderr,{filtered}")
            label = metric if filtered == "none" else key
            metrics[label] = {
                "value": float(value),
                "standard_error": None if error is None or isinstance(error, str) else float(error),
            }
            better[label] = results["higher_is_better"].get(name, {}).get(metric)
        if metrics:
            scores[name] = {
                "metrics": metrics,
                "samples": sum(results["n-samples"][task]["effective"] for task in _tasks_of(name, results)),
                "chance": _chance(_tasks_of(name, results), results),
                "version": results["versions"].get(name),
                "higher_is_better": better,
            }
    return scores


def _chance(tasks: Sequence[str], results: dict[str, Any]) -> float:
    """The accuracy of guessing, over all samples of the tasks: 0 for those that are no choice among options."""
    guesses = []
    for task in tasks:
        chosen = results["configs"][task].get("output_type") == "multiple_choice"
        twice = any(key.startswith("acc_mutual_info,") for key in results["results"].get(task, {}))
        for sample in results["samples"][task]:  # with a response for each option, or two
            guesses.append((1 + twice) / len(sample["resps"]) if chosen else 0.0)
    return sum(guesses) / len(guesses) if guesses else 0.0


def _tasks_of(name: str, results: dict[str, Any]) -> list[str]:
    """The task itself, or all tasks of a group and of the groups in it."""
    children = results["group_subtasks"].get(name) or []
    return [task for child in children for task in _tasks_of(child, results)] if children else [name]
