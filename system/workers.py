"""A loader's worker processes: they import little, ignore signals, and end with their trainer.

A worker that dies is a RuntimeError in the trainer within seconds, never a wait: torch looks for it
every 5 s, and what a worker cannot send, it dies of. They are spawned. Forked ones would copy locks
that threads of gloo or NCCL hold (torch calls both not fork safe); those of a forkserver would not
notice that their trainer was killed.
"""

import atexit
import multiprocessing.context
import multiprocessing.queues
import os
import resource
import shutil
import signal
import sys
import types
import weakref

import torch

from system.files import UserError

SHM = "/dev/shm"  # where batches go from worker to trainer
PREFETCH = 2  # batches that each worker is ahead: torch's own default


class Worker(multiprocessing.context.SpawnProcess):
    """A worker that does not import the trainer's script, and leaves signals to the trainer.

    A spawned process imports the script that spawned it, with all that the script imports. Here it
    does not, so nothing that a worker is given may be defined in the script. Ctrl-C reaches every
    process of the terminal, and DeepSpeed's launcher terminates all of its descendants; but the
    trainer needs batches up to its next checkpoint. A worker ends when its trainer says so, and
    within seconds of the trainer's death."""

    def start(self):
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # has no file to import
        blocked = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            super().start()  # the process inherits the mask, and so has it from the start
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def leave_if_orphaned(worker: int):
    """End a worker whose trainer was killed while it started: torch notices only later deaths."""
    if os.getppid() != multiprocessing.parent_process().pid:
        sys.exit(1)


class Queue(multiprocessing.queues.Queue):
    """A queue whose sender dies of what cannot be sent, as without shared memory or descriptors.

    Python's own prints the error and drops the batch, for which the trainer would wait for ever."""

    @staticmethod
    def _on_queue_feeder_error(error: Exception, item):
        print(f"A loader worker cannot send a batch: {error}", file=sys.stderr, flush=True)
        os._exit(1)


class Spawn(multiprocessing.context.SpawnContext):
    Process = Worker

    def Queue(self, maxsize: int = 0) -> Queue:  # noqa: N802, the name that torch calls
        return Queue(maxsize, ctx=self.get_context())


# --------------------------------------------------------------------------------------------------
# Open files.


def check_open_files(workers: int):
    """Raise this process's limit of open files as far as it may; UserError where that is too low.

    A run without workers opens about 12 files besides those of now, and 5 to 7 a worker."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    need = len(os.listdir("/proc/self/fd")) + 16 + 8 * workers
    if hard != resource.RLIM_INFINITY and need > hard:
        raise UserError(
            f"--workers {workers}: about {need} files will be open, and the limit is {hard}: raise "
            "it (ulimit -n), or give fewer of them, down to --workers 0."
        )


# --------------------------------------------------------------------------------------------------
# Shared memory.


def in_shared_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, moved there. UserError where there is no room."""
    try:
        return tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        raise UserError(no_room(tensor.nbytes, free_shared_memory())) from error


def check_shared_memory(workers: int, batch: int, loaders: int = 1):
    """UserError where /dev/shm is too small for the batches of `loaders` on this machine, which are
    of so many bytes: those that the workers are ahead, and the one in use."""
    need = loaders * (PREFETCH * workers + 1) * batch if workers else 0
    if need > (free := free_shared_memory()):
        raise UserError(no_room(need, free))


def free_shared_memory() -> int:
    try:
        return shutil.disk_usage(SHM).free
    except OSError:
        return 0


def no_room(need: int, free: int) -> str:
    return (
        f"--workers need {need / 1e6:,.0f} MB of shared memory for their batches, and {SHM} has "
        f"{free / 1e6:,.0f} MB free: enlarge it (docker run --shm-size), or give fewer of them, "
        "down to --workers 0."
    )


# --------------------------------------------------------------------------------------------------
# The loader.


class Loader(torch.utils.data.DataLoader):
    """Kills workers at exit: they ignore SIGTERM, so torch would wait for ever.

    They are asked to end before that."""

    def __iter__(self):
        batches = super().__iter__()
        if self.num_workers:
            atexit.register(_shut_down, weakref.ref(batches))
            for worker in batches._workers:
                worker._popen.terminate = worker._popen.kill
        return batches


def _shut_down(batches: weakref.ref):
    if batches() is not None:
        batches()._shutdown_workers()
