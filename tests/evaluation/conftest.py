from functools import cache
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def index_of_tasks():
    """lm-eval's own 15,000 tasks are looked through once in a process, not for each folder beside them: 13 s each."""
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex

    build, own = TaskIndex.build, Path(lm_eval.tasks.__file__).parent
    once = cache(lambda: build([own]))

    def of(paths):
        return {name: entry for root in paths for name, entry in (once() if root == own else build([root])).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(of))
        yield
