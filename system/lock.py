"""A folder has one writer at a time: the job that holds the lock of its file .lock."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from system.files import UserError
from system.processes import on_main

LOCK = ".lock"


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the lock of `out` while inside. Raises UserError where another job holds it
    (collective). The lock is rank 0's, and ends with that process, however it ends.

    What an earlier job that was killed has left unfinished there is deleted."""
    with contextlib.ExitStack() as held:

        def hold():
            held.callback(os.close, lock(out))
            delete_unfinished(out)

        on_main(hold)
        yield


def lock(out: Path) -> int:
    """The descriptor of out/.lock, locked; Python keeps it from programs that are started."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise not_written(out, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise UserError(
            f"--out {out}: another job is writing there; wait for it, or name another folder."
        ) from error
    except OSError:
        pass  # a file system without locks
    return file


def delete_unfinished(folder: Path):
    """Delete what a killed job has left beside its files, see `replacing`; its folders stay."""
    for scratch in folder.glob("*.new"):
        if scratch.is_dir():
            shutil.rmtree(scratch)
        else:
            scratch.unlink()


def not_written(out: Path, error: OSError) -> UserError:
    return UserError(
        f"--out {out}: {error.filename} cannot be written ({error.strerror}); mend that and repeat "
        "the command, or name another folder."
    )
