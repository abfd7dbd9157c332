"""The tests that need a GPU, counted: the kernels beside the PyTorch form and the equation, and all else marked `gpu`.

    python benchmarks/parity.py                       # every test marked gpu, on CUDA; arguments go to pytest
    python benchmarks/parity.py tests/student -n 4

A row is a file of tests. The script ends with pytest's exit code once the result is written.
"""

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from frame import ROOT, Json, Options, now, save


class ParityOptions(Options):
    """None but the arguments of pytest."""


def main() -> None:
    arguments = ["-m", "gpu", *(sys.argv[1:] or ["-n", "8"])]
    if "--help" in arguments:
        print(__doc__)
        return
    start = now()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", *arguments, f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT).returncode
        if not report.exists():  # pytest has run nothing, and has printed why
            sys.exit(code)
        rows, failures = counted(ElementTree.parse(report))
    content = {"benchmark": "tests that need a GPU", "seconds": round(now() - start, 1)}
    packages = ("flash-linear-attention", "triton", "torchao")
    save(ParityOptions(), {**content, "rows": rows, "failures": failures}, *packages)
    sys.exit(code)


def counted(report: "ElementTree.ElementTree[ElementTree.Element]") -> tuple[list[Json], list[Json]]:
    """The outcomes of each file of tests; and of each failed test its name and message."""
    outcomes: dict[str, Counter[str]] = {}
    failures = []
    for case in report.iter("testcase"):
        file = case.attrib["classname"].replace(".", "/") + ".py"
        problems = [child for child in case if child.tag in ("failure", "error")]
        skipped = any(child.tag == "skipped" for child in case)
        outcomes.setdefault(file, Counter())["failed" if problems else "skipped" if skipped else "passed"] += 1
        for problem in problems[:1]:
            message = problem.attrib.get("message", "")[:500]
            failures.append({"test": f"{file}::{case.attrib['name']}", "message": message})
    names = ("passed", "failed", "skipped")
    rows = [{"tests": file, **{name: counts[name] for name in names}} for file, counts in sorted(outcomes.items())]
    return rows, failures


if __name__ == "__main__":
    main()
