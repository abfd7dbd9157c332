"""Does a run of phases, killed at random moments, end in the weights of an undisturbed one? The miniature recipes.

    python benchmarks/survival.py
    python benchmarks/survival.py --max-steps 2 --kills 2 --num-tokens 128 --output small.json

Each recipe (RADLADS in three phases; the one-phase recipe and a long context) runs once undisturbed, float32 on the
CPU, while it is noted when it reached which step of which phase. Moments of that life are then drawn at random, of all
of it: loading, training, saving, between phases, putting the end together. A second run is killed by SIGKILL at each
of them and started again with --resume. Both must end in the same weights, bit for bit, in every phase's folder.
Inputs are the quickstart's: SmolLM2-135M-Instruct and the language reference of CPython.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from measuring import RESULTS, ROOT, provenance

from distillkit.config.resolve import load_run, resolve
from distillkit.runs.checkpoints import complete_checkpoints
from distillkit.runs.writing import sha256

RECIPES = ("radlads", "one_phase")
POLL_SECONDS = 0.02


@dataclass(frozen=True, order=True)
class State:
    """How far a run is: phases that are finished, and steps that the next one has logged."""

    finished: int
    steps: int

    @staticmethod
    def of(folder: Path, phases: list[str]) -> "State":
        finished = sum((folder / phase / "results.json").exists() for phase in phases)
        metrics = folder / phases[min(finished, len(phases) - 1)] / "metrics.jsonl"
        logged = metrics.read_text().count('"loss"') if finished < len(phases) and metrics.exists() else 0
        return State(finished, logged)

    def told(self, phases: list[str]) -> dict[str, Any]:
        phase = phases[self.finished].split("/")[1] if self.finished < len(phases) else "putting the end together"
        return {"phase": phase, "steps_logged": self.steps}


def prepare(recipe: str, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The recipe with a log line per step and a checkpoint every few, and the folders of its phases."""
    config = load_run(ROOT / "recipes" / "miniature" / f"{recipe}.yaml").config
    described = config.model_dump(mode="json")
    described["training_args"] |= {"logging_steps": 1, "save_steps": options.save_steps, "save_total_limit": 1}
    described["evaluation"] |= {"num_tokens": options.num_tokens, "max_new_tokens": 8}
    if options.max_steps is not None:
        for phase in described["phases"]:
            phase["training_args"]["max_steps"] = options.max_steps
    folders = [f"phases/{Path(phase.config.output_path).name}" for phase in resolve(config).phases]
    return described, folders


def start(work: Path, described: dict[str, Any], folder: Path) -> subprocess.Popen[bytes]:
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**described, "output_path": str(folder)}))
    log = folder.with_suffix(".log").open("ab")
    command = [sys.executable, "-m", "distillkit", str(path), "--resume"]
    return subprocess.Popen(command, cwd=work, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)})


def end(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.wait() != 0:
        sys.exit(folder.with_suffix(".log").read_text()[-3000:])


def undisturbed(work: Path, described: dict[str, Any], folder: Path, phases: list[str]) -> list[tuple[float, State]]:
    """Run, and note the seconds at which each state began; the last entry is the end."""
    began = time.monotonic()
    timeline = [(0.0, State(0, 0))]
    process = start(work, described, folder)
    while process.poll() is None:
        state = State.of(folder, phases)
        if state > timeline[-1][1]:
            timeline.append((time.monotonic() - began, state))
        time.sleep(POLL_SECONDS)
    end(process, folder)
    return [*timeline, (time.monotonic() - began, timeline[-1][1])]


def moments(timeline: list[tuple[float, State]], kills: int, chance: random.Random) -> list[tuple[State, float]]:
    """Random moments of a life, in order: the state then, and the seconds since it began."""
    drawn = sorted(chance.uniform(0, timeline[-1][0]) for _ in range(kills))
    found = []
    for moment in drawn:
        began, state = max(entry for entry in timeline[:-1] if entry[0] <= moment)
        found.append((state, moment - began))
    return found


def killed(
    work: Path, described: dict[str, Any], folder: Path, phases: list[str], drawn: list[tuple[State, float]]
) -> list[dict[str, Any]]:
    """Run, killed at each of the moments and resumed, to the end; where it was each time."""
    kills = []
    for wanted, later in drawn:
        process, began = start(work, described, folder), time.monotonic()
        while process.poll() is None and State.of(folder, phases) < wanted:
            time.sleep(POLL_SECONDS)
        time.sleep(later)
        if process.poll() is not None:
            end(process, folder)
            break  # a moment of the last second, and this life was shorter
        process.send_signal(signal.SIGKILL)
        process.wait()
        state = State.of(folder, phases)
        current = folder / phases[min(state.finished, len(phases) - 1)]
        kills.append(
            {
                **state.told(phases),
                "checkpoint_at_step": max((each.step for each in complete_checkpoints(current)), default=None),
                "seconds_after_start": round(time.monotonic() - began, 1),
            }
        )
        print(json.dumps(kills[-1]), flush=True)
    end(start(work, described, folder), folder)
    return kills


def measure(work: Path, recipe: str, kills: int, options: argparse.Namespace, chance: random.Random) -> dict[str, Any]:
    described, phases = prepare(recipe, options)
    whole, broken = work / f"{recipe}-undisturbed", work / f"{recipe}-killed"
    timeline = undisturbed(work, described, whole, phases)
    print(f"{recipe}: undisturbed in {timeline[-1][0]:.0f} s", flush=True)
    noted = killed(work, described, broken, phases, moments(timeline, kills, chance))
    weights = {}
    for part in (".", *phases):
        ours, theirs = (sha256(folder / part / "model.safetensors") for folder in (broken, whole))
        weights[part] = {"undisturbed": theirs, "killed": ours, "equal": ours == theirs}
    results = json.loads((whole / "results.json").read_text())
    for folder in (whole, broken):
        shutil.rmtree(folder)
    return {
        "recipe": f"recipes/miniature/{recipe}.yaml",
        "phases": [
            {"name": phase["name"], "steps": phase["steps"], "tokens": phase["tokens"]} for phase in results["phases"]
        ],
        "undisturbed_seconds": round(timeline[-1][0], 1),
        "kills": noted,
        "weights_sha256": weights,
        "equal": all(each["equal"] for each in weights.values()),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of all recipes together")
    parser.add_argument("--max-steps", type=int, help="of each phase, instead of the recipe's")
    parser.add_argument("--save-steps", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--num-tokens", type=int, default=512, help="tokens that each measurement reads")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, help="folder for inputs and runs; a temporary one by default")
    parser.add_argument("--output", type=Path, default=RESULTS / "survival.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    work = Path(tempfile.mkdtemp()) if options.work is None else options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, ROOT / "recipes" / "quickstart_inputs.py"], cwd=work, check=True)
    chance = random.Random(options.seed)
    shares = [options.kills - options.kills // 2, options.kills // 2]
    rows = [measure(work, recipe, kills, options, chance) for recipe, kills in zip(RECIPES, shares, strict=True)]
    settings = {name: getattr(options, name) for name in ("kills", "max_steps", "save_steps", "num_tokens", "seed")}
    result = {
        **provenance("distillkit", "accelerate"),
        "settings": settings,
        "precision": "float32",
        "kills": sum(len(row["kills"]) for row in rows),
        "equal": all(row["equal"] for row in rows),
        "recipes": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['kills']} kills, weights {'equal' if result['equal'] else 'DIFFER'}; {options.output}")
    if options.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
