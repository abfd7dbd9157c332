from functools import cache
from pathlib import Path

import pytest

NAMED = ("arc", "gsm8k", "hellaswag", "lambada", "mmlu", "openbookqa", "piqa", "super_glue", "winogrande")
"""Folders of lm-eval's tasks that a test names."""


@pytest.fixture(autouse=True, scope="session")
def index_of_tasks():
    """Of lm-eval's own 15,000 tasks those that tests name are looked through, once in a process: all take 13 s."""
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex

    build, own = TaskIndex.build, Path(lm_eval.tasks.__file__).parent
    once = cache(lambda: build([own / name for name in NAMED]))

    def of(paths):
        return {name: entry for root in paths for name, entry in (once() if root == own else build([root])).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(of))
        yield


@pytest.fixture
def packages_unasked(monkeypatch):
    """lm-eval asks pip for all packages whenever it has evaluated: a second or two."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
