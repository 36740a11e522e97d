"""A loader's processes: they start light, leave signals to the trainer, and end when it does.

They are spawned. Forked ones copy locks that threads of gloo or NCCL hold (torch calls both not
fork safe); those of a forkserver do not notice that their trainer was killed.
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
    """A loader's process. Of ours it imports this file alone, and it leaves signals to the trainer.

    Spawned processes import the script that spawned them, with all that it imports; what a worker
    is given must therefore be defined elsewhere. Ctrl-C goes to every process of the terminal, and
    DeepSpeed's launcher terminates all that descend from it; the trainer still needs batches up to
    its next checkpoint. A worker ends when its trainer says so, and within seconds of a trainer
    that was killed."""

    def start(self):
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # it has no file to import
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            super().start()  # the process inherits the mask, so that it has it from the start
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def leave_if_orphaned(worker: int):
    """Ends a worker whose trainer was killed while it started: torch notices only later deaths."""
    if os.getppid() != multiprocessing.parent_process().pid:
        sys.exit(1)


class Spawn(multiprocessing.context.SpawnContext):
    Process = Worker


class Loader(torch.utils.data.DataLoader):
    """Ends its workers, though they ignore SIGTERM, torch's and Python's last word before they wait
    for ever. At exit they are asked first; what lives on is killed."""

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
