"""Whether pip finds versions that go together for each extra of pyproject.toml, and which: nothing is installed.

Each line is one `pip install --dry-run`, with the Python that runs this, as if nothing was installed yet: vLLM's takes
minutes. Exits with 1 where one finds none.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHOWN = ("torch", "transformers", "vllm", "lm_eval", "flash-linear-attention", "peft", "torchao")
OLDEST = {"vllm": "vllm==0.24.0"}
"""Packages of extras whose oldest version is asked for, too: it wants others beside it."""


def resolve(extras: str, *requirements: str) -> str | None:
    """The versions that pip would install, in words; None where it finds none, after its own words on stderr."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    answer = subprocess.run([*command, f"{ROOT}[{extras}]", *requirements], stdout=subprocess.PIPE, text=True)
    if answer.returncode:
        return None
    found = {each["metadata"]["name"]: each["metadata"]["version"] for each in json.loads(answer.stdout)["install"]}
    return ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)


def main() -> int:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [[name] for name in extras]
    asked += [[name, oldest] for name in extras for package, oldest in OLDEST.items() if package in str(extras[name])]
    asked.append([",".join(name for name in extras if name != "dev")])
    failed = 0
    for extra, *requirements in asked:
        versions = resolve(extra, *requirements)
        failed += versions is None
        print(" ".join([f"[{extra}]", *requirements]), "->", versions or "none go together", flush=True)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
