"""A loader's worker processes: they import little, ignore signals, and end with their trainer.

They are spawned. Forked ones would copy locks that threads of gloo or NCCL hold (torch calls both
not fork safe); those of a forkserver would not notice that their trainer was killed.
"""

import atexit
import multiprocessing.context
import os
import signal
import sys
import types
import weakref

import torch


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


class Spawn(multiprocessing.context.SpawnContext):
    Process = Worker


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
