"""Laws of workers.py: a worker that fails ends the program with a sentence, and never a wait."""

import contextlib
import io
import multiprocessing.connection
import os
import shutil
import signal

import pytest
import torch
from conftest import refusal, small_disk
from PIL import Image

import data
from system import workers
from system.program import reported

SIDE = 512


@contextlib.contextmanager
def at_most(seconds: int):
    """Raises TimeoutError, rather than wait for ever."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def in_worker() -> bool:
    return torch.utils.data.get_worker_info() is not None


class Killed(str):
    """A caption at which a worker is killed, as by the kernel for want of memory."""

    def __reduce__(self):
        if in_worker():
            os.kill(os.getpid(), signal.SIGKILL)
        return Killed, (str(self),)


class KilledInSending(str):
    """A caption at which a worker is killed while no other can send, since it holds the lock."""

    def __reduce__(self):
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        if in_worker():
            multiprocessing.connection.Connection._send_bytes = die
        return KilledInSending, (str(self),)


class Unsendable(str):
    """A caption that cannot be sent, as a batch when there are no descriptors left."""

    def __reduce__(self):
        if in_worker():
            raise OSError("Too many open files")
        return Unsendable, (str(self),)


def batches_of(caption: str, workers: int):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    row = {"jpg_0": buffer.getvalue(), "jpg_1": buffer.getvalue() + bytes(1), "label_0": 1.0}
    pairs = data.Pairs([row | {"caption": caption}], SIDE, 0, caption_dropout=0)
    return data.loader(pairs, 0, 20, 0, 1, 1, 1, workers)


FAILURES = {
    "killed": (Killed, 1, "rank 0: a loader process is killed by signal: Killed, perhaps"),
    "killed with the lock": (KilledInSending, 2, "a loader process is killed by signal: Killed"),
    "unsendable": (Unsendable, 1, "a loader process exited unexpectedly"),
    "no shared memory": (str, 1, "--workers need 2 MB of shared memory for their batches"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_worker_that_fails_ends_the_program_in_one_sentence(case, capfd):
    caption, workers, words = FAILURES[case]
    # No file may be larger, those in shared memory included; the rows that workers get are small.
    with (
        small_disk(10**5 if case == "no shared memory" else 10**9),
        pytest.raises(SystemExit) as stop,
        at_most(100),
        reported("train_inpo.py", every_rank=True),
    ):
        list(batches_of(caption("x"), workers))
    said = capfd.readouterr().err
    assert stop.value.code == (2 if case == "no shared memory" else 1)
    assert words in said and "Traceback" not in said
    assert said.splitlines()[-1].startswith("train_inpo.py: error: ") and said.endswith(".\n")


def test_too_little_shared_memory_is_said_before_a_worker_starts(monkeypatch):
    free = 10**7

    def disk_usage(path):
        assert path == "/dev/shm"
        return shutil._ntuple_diskusage(10**9, 10**9 - free, free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    workers.check_shared_memory(0, 10**9)
    workers.check_shared_memory(2, 10**6, loaders=2)
    said = refusal(workers.check_shared_memory, 2, 10**6 + 1, 2)
    assert "need 10 MB of shared memory" in said and "/dev/shm has 10 MB free" in said
    for words in ("--shm-size", "--workers 0"):
        assert words in said
