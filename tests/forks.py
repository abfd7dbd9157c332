"""Clean processes, for runs that are to be killed or that are several: forked from one that has imported everything.

A process that begins by itself takes ten seconds of a core. Forks wait for no disk and draw each picture once, as tests
do.
"""

import multiprocessing
import socket

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.forks_imports"])


def environments(number=2):
    """What tells each of so many processes of the others, as torchrun, srun and mpirun do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def started(function, each):
    """Processes that call the function, each with its own arguments."""
    forks = [processes.Process(target=function, args=arguments) for arguments in each]
    for fork in forks:
        fork.start()
    return forks


def exit_codes(forks, seconds):
    """Of processes that end by themselves within so many seconds; None for one that has to be killed."""
    try:
        for fork in forks:
            fork.join(seconds)
    finally:
        codes = [fork.exitcode for fork in forks]
        for fork in forks:
            fork.kill()
    return codes
