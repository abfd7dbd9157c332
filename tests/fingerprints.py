"""Of each step in which rows are made, the datasets library hashes function and arguments: a tenth of a tiny run."""

from datasets import arrow_dataset, fingerprint


def leave_out_fingerprints() -> None:
    """They name the files of a cache that is off where rows are made (`distillkit.data.dataset`)."""
    for module in (arrow_dataset, fingerprint):
        module.update_fingerprint = lambda *_: fingerprint.generate_random_fingerprint()
