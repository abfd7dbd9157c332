"""Benchmarks are started by hand and rarely, so nothing else would notice that one has lost what it imports."""

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

ASK_EACH_FOR_HELP = """
import runpy, sys, traceback
failed = []
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            failed.append(script)
    except Exception:
        traceback.print_exc()
        failed.append(script)
sys.exit(", ".join(failed) or 0)
"""


def test_every_benchmark_starts():
    scripts = sorted(map(str, BENCHMARKS.glob("*.py")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    command = [sys.executable, "-c", ASK_EACH_FOR_HELP, *scripts]
    done = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True)
    assert scripts and done.returncode == 0, done.stderr[-3000:]
