"""Clean processes, for runs that are to be killed or that are several: forked from one that has imported everything.

To start anew takes a process ten seconds of a core. Forks wait for no disk and draw each picture once, as tests do.
"""

import multiprocessing

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.forks_imports"])
