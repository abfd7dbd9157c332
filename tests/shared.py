"""What takes long to make is made by one of pytest's workers, for all."""

import os

from filelock import FileLock


def made_once(tmp_path_factory, name, make):
    """The folder of that name, which `make` has filled; the other workers wait for it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            made = tmp_path_factory.mktemp("made")
            make(made)
            made.rename(folder)
    return folder
