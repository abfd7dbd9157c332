"""The folder of a run: names of its files, the record `run.json`, metrics, checkpoints, provenance."""
