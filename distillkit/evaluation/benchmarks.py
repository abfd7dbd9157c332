"""Tasks of the LM Evaluation Harness, by its Python API; the scores equal those of its own command.

lm-eval is an optional dependency. A task is looked up by name among lm-eval's own and in folders that the user names; a
local one needs no network, nor does one of lm-eval's own that reads its documents from the user's files.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillkit.config.errors import UserError, did_you_mean
from distillkit.config.evaluate import BenchmarksConfig
from distillkit.evaluation.generation import can_fork
from distillkit.evaluation.local_benchmarks import KEY, LOCAL_TASKS, Documents, read_documents
from distillkit.models.server import ServedModel
from distillkit.models.special_tokens import prompt_tokenizer

Progress = Callable[[int, int], None]


def run_benchmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: BenchmarksConfig,
    task: str,
    *,
    limit: int | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """Scores of a task, or of each task of a group and, where it has scores of its own, of the group.

    Args:
        task: name of a task, a group or a tag, or the path of a task's YAML.
        limit: samples of each task; all by default.
        progress: called with how many requests of a kind are answered, and how many there are.

    Returns: by name of the task, `metrics` (by name, and filter where there are several: `value`, `standard_error` or
        None), `samples`, `chance` (the accuracy of guessing; 0 where no option is chosen), `version`,
        `higher_is_better` by the same names as `metrics` (None where it is unknown), `items` (as of `_items`), and
        `note` where the documents are not those of the hub.

    Raises:
        UserError: as of `check_tasks`.
    """
    tasks = check_tasks(settings, [task])
    from lm_eval.models.huggingface import HFLM

    from distillkit.evaluation.shared_contexts import SharedContextLM

    kind = SharedContextLM if settings.share_contexts and can_fork(model) else HFLM
    with _without_noise():
        harness = kind(
            pretrained=model, tokenizer=prompt_tokenizer(tokenizer), backend="causal", batch_size=settings.batch_size
        )
        return _evaluate(harness, tasks, settings, task, limit, progress)


def run_served_benchmark(
    served: ServedModel,
    settings: BenchmarksConfig,
    task: str,
    *,
    limit: int | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """The same of a model that a server answers for, and `server`: where the scores come from.

    Raises `UserError` also where the server gives no log-probabilities of prompts and the task needs them.
    """
    tasks = check_tasks(settings, [task])
    from distillkit.evaluation.served_lm import ServedLM

    with _without_noise():
        scores = _evaluate(ServedLM(served, settings.seed), tasks, settings, task, limit, progress)
    return {name: {**each, "server": served.about()} for name, each in scores.items()}


@dataclass(frozen=True)
class Tasks:
    """manager: lm-eval's `TaskManager`. notes: by task, in which way its documents are not those of the hub."""

    manager: Any
    notes: dict[str, str]


def _evaluate(
    harness: Any, tasks: Tasks, settings: BenchmarksConfig, task: str, limit: int | None, progress: Progress
) -> dict[str, dict[str, Any]]:
    """harness: a model as lm-eval takes it."""
    from lm_eval import simple_evaluate

    _report_answers(harness, progress)
    with _without_detours():
        results = simple_evaluate(
            harness,
            tasks=[task],
            task_manager=tasks.manager,
            num_fewshot=settings.num_fewshot,
            apply_chat_template=settings.apply_chat_template,
            limit=limit,
            log_samples=True,  # from which chance is known
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    note = {"note": tasks.notes[task]} if task in tasks.notes else {}
    return {name: {**scores, **note} for name, scores in _scores(results).items()}


@contextmanager
def _without_detours() -> Iterator[None]:
    """lm-eval compiles a template again for each text, and asks pip and others what is installed."""
    from lm_eval import evaluator, utils

    from_string, add_env_info = utils.env.from_string, evaluator.add_env_info
    utils.env.from_string, evaluator.add_env_info = cache(from_string), lambda results: None
    try:
        yield
    finally:
        utils.env.from_string, evaluator.add_env_info = from_string, add_env_info


def _report_answers(harness: Any, progress: Progress) -> None:
    """Have lm-eval's model tell of each answer: it hands them to its cache, one by one."""
    from lm_eval.api.model import CacheHook

    class Counter(CacheHook):
        def __init__(self, total: int) -> None:
            super().__init__(None)
            self.done, self.total = 0, total

        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            self.done += 1
            progress(self.done, self.total)

    def counted(answer: Callable[..., Any], requests: list[Any], **options: Any) -> Any:
        harness.set_cache_hook(Counter(len(requests)))
        return answer(requests, **options)

    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(harness, kind, partial(counted, getattr(harness, kind)))


def check_tasks(settings: BenchmarksConfig, names: Sequence[str]) -> Tasks:
    """lm-eval's tasks, among which are those of the names: of its own, or of the folders that the user names.

    Raises:
        UserError: lm-eval is not installed, a folder does not exist, there is no such task, or its files are missing
            or not as they should be.
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
    return Tasks(tasks, {}) if settings.data is None else _from_files(tasks, settings, settings.data, names)


def _from_files(known: Any, settings: BenchmarksConfig, folder: str, names: Sequence[str]) -> Tasks:
    """The tasks, of which those of lm-eval's own read their documents from a folder; all else of them is lm-eval's."""
    from lm_eval.tasks import TaskManager

    index, notes = dict(known.task_index), {}
    for name in names:
        if name not in index or not _is_lm_evals(name, index):
            continue
        if name not in LOCAL_TASKS:
            raise UserError("benchmarks.tasks", f"{KEY} has no {name!r}, only {', '.join(LOCAL_TASKS)}")
        tasks = {part: _configuration(index[part]) for part in _leaves(name, index)}
        shots = next(_shots(task, settings) for task in tasks.values())
        documents = read_documents(name, folder, shots)
        if len(tasks) > 1:
            documents.check_subjects({task["dataset_name"] for task in tasks.values()})
        for part, task in tasks.items():
            own = documents if len(tasks) == 1 else documents.of_subject(task["dataset_name"])
            task["custom_dataset"] = _dataset(part, task, own, shots)
            if task.get("process_docs"):  # lm-eval asks for the documents again and again
                task["process_docs"] = cache(task["process_docs"])
            index[part] = replace(index[part], yaml_path=None, cfg=task)
        if documents.note:
            notes[name] = documents.note
    manager = TaskManager(include_defaults=False)
    manager.task_index.update(index)
    return Tasks(manager, notes)


def _is_lm_evals(name: str, index: dict[str, Any]) -> bool:
    """Whether a task is lm-eval's own; a tag, whose tasks have files of their own, if one of these is."""
    import lm_eval.tasks

    entry = index[name]
    if entry.yaml_path is None:
        return any(_is_lm_evals(task, index) for task in entry.tags)
    return Path(lm_eval.tasks.__file__).parent in entry.yaml_path.parents


def _leaves(name: str, index: dict[str, Any]) -> list[str]:
    """The task itself, or the tasks of a group or tag and of the groups and tags in it."""
    entry = index[name]
    children = sorted(entry.tags) if entry.yaml_path is None else entry.cfg["task"]
    return [name] if isinstance(children, str) else [leaf for child in children for leaf in _leaves(child, index)]


def _configuration(entry: Any) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(entry.yaml_path)


def _shots(task: dict[str, Any], settings: BenchmarksConfig) -> int:
    """Examples before each question; lm-eval does not change a task's 0."""
    own = task.get("num_fewshot")
    return own or 0 if own == 0 or settings.num_fewshot is None else settings.num_fewshot


def _dataset(name: str, task: dict[str, Any], documents: Documents, shots: int) -> Callable[..., dict[str, Any]]:
    """What lm-eval calls for a task's splits."""
    from datasets import Dataset

    asked = task.get("test_split") or task["validation_split"]
    examples = task.get("fewshot_split") or task.get("training_split")
    needed = shots + (task.get("test_split") is None)  # lm-eval draws one more there, lest it is the question itself
    if shots and examples and len(documents.examples) < needed:
        raise UserError(KEY, f"has {len(documents.examples)} examples for {name}; {shots} of them need {needed}")
    splits = {asked: documents.asked, **({examples: documents.examples} if examples else {})}
    return lambda **_: {split: Dataset.from_list(rows) for split, rows in splits.items()}


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
        metrics, better, tasks = {}, {}, _tasks_of(name, results)
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
            better[label] = results["higher_is_better"].get(tasks[0], {}).get(metric)
        if metrics:
            scores[name] = {
                "metrics": metrics,
                "samples": sum(results["n-samples"][task]["effective"] for task in tasks),
                "chance": _chance(tasks, results),
                "version": results["versions"].get(name),
                "higher_is_better": better,
                "items": _items(tasks, results),
            }
    return scores


def _items(tasks: Sequence[str], results: dict[str, Any]) -> dict[str, Any]:
    """What each item scored, so that two models can be compared item by item.

    `digest`: of the items and their prompts, in their order. `values`: by the names of `metrics`, of those that have a
    number for every item: a digit for each item where all are 0 or 1, else a list.
    """
    digest, columns, counted = sha256(), dict[str, list[float]](), 0
    for task in tasks:
        samples = results["samples"][task]
        for sample in samples:
            filtered = sample["filter"]
            if filtered == samples[0]["filter"]:
                counted += 1
                digest.update(f"{task} {sample['doc_hash']} {sample['prompt_hash']}\n".encode())
            for metric in sample["metrics"]:
                value = sample[metric]
                if isinstance(value, bool | int | float | np.number | np.bool_):
                    columns.setdefault(metric if filtered == "none" else f"{metric},{filtered}", []).append(
                        float(value)
                    )
    whole = {name: values for name, values in columns.items() if len(values) == counted}
    values = {name: "".join(f"{each:.0f}" for each in of) if {*of} <= {0, 1} else of for name, of in whole.items()}
    return {"digest": digest.hexdigest()[:16], "values": values}


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
