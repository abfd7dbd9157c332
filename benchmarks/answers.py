"""What students answer beside their teacher: benchmarks, generated text and divergence, from finished evaluations.

    python benchmarks/answers.py --evaluations runs/evaluation --runs hybrid=runs/closest kda_only=runs/retrieval

Measures nothing itself: it keeps the results of `distillkit evaluate` of each folder, without texts and paths of the
machine, and how each student was trained.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from frame import Json, Options, option, parse, save

SUITES = ("models", "divergence", "generation", "benchmarks", "long_context")
SETTINGS = ("divergence", "generation", "benchmarks", "long_context")


@dataclass(kw_only=True)
class AnswersOptions(Options):
    evaluations: list[Path] = option([], "folders of distillkit evaluate; of one model several times, the last counts")
    runs: list[str] = option([], "STUDENT=FOLDER for each student")

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise ValueError("--evaluations names no folder")


def kept(results: Json) -> Json:
    """An evaluation as the report reads it, without subtasks and without where things lay on that machine."""
    content: Json = {"kind": results["kind"], "format": results["format"]}
    content |= {name: results[name] for name in SUITES}
    content["models"] = {name: {**about, "path": name} for name, about in results["models"].items()}
    tasks = results["config"]["benchmarks"]["tasks"]
    content["benchmarks"] = {
        name: {task: scores(found[task]) for task in tasks if task in found}
        for name, found in results["benchmarks"].items()
    }
    config = {name: results["config"].get(name) for name in SETTINGS}
    content["config"] = json.loads(json.dumps(config), object_hook=without_folders)
    names = ("model", "suite", "task")
    content["failures"] = [{name: each[name] for name in names} for each in results["failures"]]
    return content | {name: results[name] for name in ("missing", "versions", "machine")}


def scores(found: Json) -> Json:
    """A task with its items, which are right or wrong; log-likelihoods of items are left out."""
    values = {metric: value for metric, value in found["items"]["values"].items() if isinstance(value, str)}
    return {**found, "items": {**found["items"], "values": values}}


def without_folders(section: Json) -> Json:
    """File names alone, of values that are absolute paths."""
    return {
        name: Path(value).name if isinstance(value, str) and value.startswith("/") else value
        for name, value in section.items()
    }


def trained(folder: Path) -> Json:
    """How a student came to be: recipe, seeds, phases, divergence on held-out text, and where the time went."""
    results = json.loads((folder / "results.json").read_text())
    phases = [
        {name: phase[name] for name in ("name", "tokens", "steps", "seconds", "sequence_length", "divergence")}
        for phase in results["phases"]
    ]
    return {
        "recipe": results["config"]["project_name"],
        "student": results["config"]["student"],
        "seeds": results["seeds"],
        **{name: results["training"][name] for name in ("tokens", "seconds")},
        "clock": results["clock"],
        "phases": phases,
        "machine": results["machine"],
        "versions": results["versions"],
    }


def main() -> None:
    options = parse(AnswersOptions)
    evaluations = [kept(json.loads((folder / "results.json").read_text())) for folder in options.evaluations]
    runs = {name: trained(Path(folder)) for name, folder in (each.split("=", 1) for each in options.runs)}
    last = json.loads((options.evaluations[-1] / "results.json").read_text())
    save(
        options,
        {
            "benchmark": "what students answer beside their teacher",
            "machine": {"gpu": last["machine"]["device"]},
            "versions": last["versions"],
            "commit": last["commit"],
            "runs": runs,
            "evaluations": evaluations,
        },
    )


if __name__ == "__main__":
    main()
