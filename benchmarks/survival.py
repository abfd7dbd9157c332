"""Does a run of phases, killed at random moments, end in the weights of an undisturbed one? The miniature recipes.

    python benchmarks/survival.py
    python benchmarks/survival.py --max-steps 2 --kills 2 --num-tokens 128 --output small.json

Each recipe (RADLADS in three phases; the one-phase recipe and a long context) runs once undisturbed, float32 on the
CPU, while it is noted when it reached which step of which phase. Moments of that life are then drawn at random, of all
of it: loading, training, saving, between phases, putting the end together. A second run is killed by SIGKILL at each
of them and started again with --resume. Both must end in the same weights, bit for bit, in every phase's folder.
Inputs are the quickstart's: SmolLM2-135M-Instruct and the language reference of CPython.
"""

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

import yaml

from distillkit.config.resolve import load_run, resolve
from distillkit.runs.checkpoints import complete_checkpoints
from distillkit.runs.writing import sha256
from frame import ROOT, Json, Options, option, parse, save, show

State = tuple[int, int]
"""How far a run is: phases that are finished, and steps that the next one has logged."""
NEVER = (sys.maxsize, 0)
RECIPES = ("radlads", "one_phase")
POLL_SECONDS = 0.02


@dataclass(kw_only=True)
class SurvivalOptions(Options):
    kills: int = option(10, "of all recipes together")
    max_steps: int | None = option(None, "of each phase, instead of the recipe's")
    save_steps: int = option(5, "steps between checkpoints")
    num_tokens: int = option(512, "tokens that each measurement reads")
    seed: int = option(0, "of the moments")
    work: Path | None = option(None, "folder for inputs and runs; by default a temporary one")


@dataclass(frozen=True)
class Run:
    """A run of a recipe in a folder, which can be killed and started again."""

    folder: Path
    described: Json
    phases: list[str]
    """Folders of the phases, relative to that of the run."""

    def live(self, moments: list[tuple[State, float]]) -> tuple[list[tuple[float, State]], list[Json]]:
        """Run to the end, killed at each of the moments (seconds after a state began) and resumed.

        Returns the seconds at which each state began, the last entry being the end, and how far it was at each kill.
        """
        timeline, kills = [(0.0, (0, 0))], []
        for wanted, later in [*moments, (NEVER, 0.0)]:
            process, began = self.start(), time.monotonic()
            while process.poll() is None and (state := self.state()) < wanted:
                if state > timeline[-1][1]:
                    timeline.append((time.monotonic() - began, state))
                time.sleep(POLL_SECONDS)
            time.sleep(later)
            if process.poll() is not None:  # to its end, or before a moment of the last second
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills.append({**self.progress(), "seconds_after_start": round(time.monotonic() - began, 1)})
            show(kills[-1])
        if process.returncode:
            sys.exit(self.folder.with_suffix(".log").read_text()[-3000:])
        return [*timeline, (time.monotonic() - began, timeline[-1][1])], kills

    def start(self) -> subprocess.Popen[bytes]:
        path = self.folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump({**self.described, "output_path": str(self.folder)}))
        command = [sys.executable, "-m", "distillkit", str(path), "--resume"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self.folder.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(command, cwd=path.parent, stdout=log, stderr=log, env=environment)

    def state(self) -> State:
        finished = sum((self.folder / phase / "results.json").exists() for phase in self.phases)
        metrics = self.phase_folder(finished) / "metrics.jsonl"
        logged = metrics.read_text().count('"loss"') if finished < len(self.phases) and metrics.exists() else 0
        return finished, logged

    def phase_folder(self, finished: int) -> Path:
        """Of the phase that runs, or of the last one."""
        return self.folder / self.phases[min(finished, len(self.phases) - 1)]

    def progress(self) -> Json:
        finished, steps = self.state()
        checkpoints = [each.step for each in complete_checkpoints(self.phase_folder(finished))]
        phases = [phase.split("/")[1] for phase in self.phases] + ["putting the end together"]
        return {"phase": phases[finished], "steps_logged": steps, "checkpoint_at_step": max(checkpoints, default=None)}


def described_run(recipe: str, options: SurvivalOptions) -> tuple[Json, list[str]]:
    """The recipe with a log line per step and a checkpoint every few, and the folders of its phases."""
    config = load_run(ROOT / "recipes" / "miniature" / f"{recipe}.yaml").config
    described = config.model_dump(mode="json")
    described["training_args"] |= {"logging_steps": 1, "save_steps": options.save_steps, "save_total_limit": 1}
    described["evaluation"] |= {"num_tokens": options.num_tokens, "max_new_tokens": 8}
    if options.max_steps is not None:
        for phase in described["phases"]:
            phase["training_args"]["max_steps"] = options.max_steps
    return described, [f"phases/{Path(phase.config.output_path).name}" for phase in resolve(config).phases]


def random_moments(
    timeline: list[tuple[float, State]], number: int, chance: random.Random
) -> list[tuple[State, float]]:
    """Random moments of a life, in order: the state then, and the seconds since it began."""
    moments = []
    for moment in sorted(chance.uniform(0, timeline[-1][0]) for _ in range(number)):
        began, state = max(entry for entry in timeline[:-1] if entry[0] <= moment)
        moments.append((state, moment - began))
    return moments


def measure(work: Path, recipe: str, kills: int, options: SurvivalOptions, chance: random.Random) -> Json:
    described, phases = described_run(recipe, options)
    whole, broken = (Run(work / f"{recipe}-{name}", described, phases) for name in ("undisturbed", "killed"))
    timeline, _ = whole.live([])
    print(f"{recipe}: undisturbed in {timeline[-1][0]:.0f} s", flush=True)
    _, noted = broken.live(random_moments(timeline, kills, chance))
    weights = {}
    for part in (".", *phases):
        ours, theirs = (sha256(run.folder / part / "model.safetensors") for run in (broken, whole))
        weights[part] = {"undisturbed": theirs, "killed": ours, "equal": ours == theirs}
    results = json.loads((whole.folder / "results.json").read_text())
    for run in (whole, broken):
        shutil.rmtree(run.folder)
    return {
        "recipe": f"recipes/miniature/{recipe}.yaml",
        "phases": [{name: phase[name] for name in ("name", "steps", "tokens")} for phase in results["phases"]],
        "undisturbed_seconds": round(timeline[-1][0], 1),
        "kills": noted,
        "weights_sha256": weights,
        "equal": all(each["equal"] for each in weights.values()),
    }


def main() -> None:
    options = parse(SurvivalOptions)
    with tempfile.TemporaryDirectory() as folder:
        work = (options.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, ROOT / "recipes" / "quickstart_inputs.py"], cwd=work, check=True)
        chance = random.Random(options.seed)
        shares = [options.kills - options.kills // 2, options.kills // 2]
        rows = [measure(work, recipe, kills, options, chance) for recipe, kills in zip(RECIPES, shares, strict=True)]
    kills, equal = sum(len(row["kills"]) for row in rows), all(row["equal"] for row in rows)
    settings = options.settings("kills", "max_steps", "save_steps", "num_tokens", "seed")
    content = {"settings": settings, "precision": "float32", "kills": kills, "equal": equal, "recipes": rows}
    save(options, content, "accelerate")
    print(f"{kills} kills, weights {'equal' if equal else 'DIFFER'}; {options.result_file}")


if __name__ == "__main__":
    main()
