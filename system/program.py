"""How a program speaks to its user: its --help, and how it ends.

Nothing here takes long to import, so that programs can answer --help and wrong flags at once.
"""

import argparse
import contextlib
import errno
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator

from system.files import UserError
from system.text import printable

# Libraries print errors only: notes of many ranks, at import or load, hide what matters. This holds
# for libraries that are imported later, and a user's own settings come first.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Description and epilog as they are written, and each option's default behind its help."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number.")
    return value


class Parser(argparse.ArgumentParser):
    """A parser of flags, whose errors are printed once a node however many ranks there are. None
    of its floats may be infinite or NaN."""

    def __init__(self, prog: str, description: str | None = None, **options):
        options = {"formatter_class": HelpFormatter} | options
        super().__init__(prog, description=description, **options)
        self.register("type", float, finite)  # of every flag that is declared as a float

    def error(self, message: str):
        leave(2, f"{self.prog}: error: {printable(message)}")


class Steady:
    """A text stream that loses what it cannot write, as on a full disk, and goes on."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # of names of files that are no UTF-8

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def writelines(self, lines):
        self.write("".join(lines))

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def keep_printing():
    """From now on printing never ends the program, on a full disk or in a closed terminal."""
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(sys, name), Steady):
            setattr(sys, name, Steady(stream))


def leave(code: int, said: str, every_rank: bool = False):
    """Print a last line, once a node or on every rank, and exit."""
    if every_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(said, file=sys.stderr, flush=True)
    sys.exit(code)


@contextlib.contextmanager
def reported(program: str, every_rank: bool = False) -> Iterator[None]:
    """End the program in one sentence: exit code 2 for a UserError, 1 where another rank or a
    loader process is gone, 130 for Ctrl-C.

    What all ranks know is printed once a node. every_rank: a rank may fail alone, so each prints
    its own, with its number."""
    rank = f"rank {os.environ.get('RANK', '0')}: "
    keep_printing()
    try:
        yield
    except UserError as error:
        who = rank if every_rank else ""
        leave(2, f"{program}: error: {who}{error}", every_rank)
    except (RuntimeError, OSError) as error:
        if os.strerror(errno.EMFILE) in str(error):
            said = (
                "too many files are open; raise the limit of open files (ulimit -n), or give fewer "
                "--workers; the same command resumes."
            )
        elif lost_peer(error):
            said = "another rank is gone; unless it says what to mend, the same command resumes."
        elif why := lost_worker(error):
            said = (
                f"a loader process {why}, perhaps for want of memory: free some, or give fewer "
                "--workers; the same command resumes."
            )
        else:
            raise
        leave(1, f"{program}: error: {rank}{said}", True)
    except KeyboardInterrupt:
        leave(130, f"\n{program}: interrupted; the same command resumes.")


LOST = (
    "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe",
    "Timed out waiting", "timeout caused pair closure",  # gloo
    "remote process exit", "communicator was aborted", "collective operation timeout",  # NCCL
    "Connection was likely closed", "wait timeout after", "waiting for clients",  # the store
)  # fmt: skip


def lost_peer(error: BaseException) -> bool:
    """Whether torch.distributed says by `error` that another rank vanished or hangs.

    gloo raises plain RuntimeErrors, and NCCL's class has other causes as well: the text decides."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


def lost_worker(error: BaseException) -> str:
    """What torch says of a loader process that died, as "is killed by signal: Killed", or ""."""
    found = re.search(r"DataLoader worker \(pid.*?\) ((?:is|exited) [\w :]+)", str(error))
    first = lost_worker(error.__cause__) if error.__cause__ else ""  # it says more
    return first or (found[1].strip() if found else "")
