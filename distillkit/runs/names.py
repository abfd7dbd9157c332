"""Names of the files and folders in a run's folder, for whoever writes or reads them."""

RUN = "run.json"
"""The record: what the run was started with, and what a resumed run needs (`runs.record`)."""
RESULTS = "results.json"
"""Written last: a folder that has it holds a finished run, phase or evaluation."""
METRICS = "metrics.jsonl"
PHASES = "phases"
"""Folder with a folder for each phase, `1-alignment`, where the YAML names phases."""
UNTRAINED = "untrained"
"""Folder of the converted student before any training."""
PREPARED = "_prepared"
"""Folder of the rows that the processes of a run share until it ends. Names with _ are not pushed to the hub.

Captured rows that are packed already are not copied there: next to nothing is done to them, and they are large.
"""
CHECKPOINT = "checkpoint-"
"""Beginning of a checkpoint's folder; the number of its step follows."""
COMPLETE = "complete"
"""File that a checkpoint has once all else in it is written."""
CARD, HTML, MARKDOWN = "README.md", "report.html", "report.md"
