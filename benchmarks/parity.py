"""The tests that need a GPU, counted: the kernels beside the PyTorch form and the equation, and all else marked `gpu`.

    python benchmarks/parity.py                       # every test marked gpu, on CUDA; arguments go to pytest
    python benchmarks/parity.py tests/model -n 4

A row is a file of tests. The script ends with pytest's exit code once the result is written.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from measuring import RESULTS, ROOT, provenance

OUTCOMES = ("passed", "failed", "skipped")


def main() -> None:
    arguments = ["-m", "gpu", *(sys.argv[1:] or ["-n", "8"])]
    if "--help" in arguments:
        print(__doc__)
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", *arguments, f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT).returncode
        if not report.exists():  # pytest did not come to run anything, and has said why
            sys.exit(code)
        rows, failures = counted(ElementTree.parse(report))
    result = {
        "benchmark": "tests that need a GPU",
        "command": " ".join(["python benchmarks/parity.py", *sys.argv[1:]]),
        **provenance("flash-linear-attention", "triton", "torchao"),
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
        "failures": failures,
    }
    (RESULTS / "parity.json").write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(code)


def counted(report: "ElementTree.ElementTree[ElementTree.Element]") -> tuple[list[dict], list[dict]]:
    """Of each file of tests how they went; and of each failed one its name and message."""
    outcomes: dict[str, Counter[str]] = {}
    failures = []
    for case in report.iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        file = case.attrib["classname"].replace(".", "/") + ".py"
        outcomes.setdefault(file, Counter())[outcome] += 1
        if outcome == "failed":
            problem = next(child for child in case if child.tag in ("failure", "error"))
            failures.append(
                {"test": f"{file}::{case.attrib['name']}", "message": problem.attrib.get("message", "")[:500]}
            )
    rows = [{"tests": file, **{outcome: counts[outcome] for outcome in OUTCOMES}} for file, counts in outcomes.items()]
    return sorted(rows, key=lambda row: row["tests"]), failures


if __name__ == "__main__":
    main()
