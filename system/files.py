"""Files, and the mistakes that a user can set right: one error, one atomic write, one reader.

Nothing here takes long to import, so that programs can answer --help and wrong flags at once.
"""

import contextlib
import errno
import functools
import itertools
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

from system.text import printable

ROOT = Path(__file__).parents[1]  # the folder of train_inpo.py
os.umask(UMASK := os.umask(0o077))  # it can be read by setting it alone

# -------------------------------------------------------------------------------------------------
# Mistakes.


class UserError(ValueError):
    """What a user can set right: one sentence with the file, row or flag, and the fix.

    It may name what others wrote, which is made `printable`. torch's DataLoader rebuilds a worker's
    exception from the text of its traceback; the sentence is cut out of that text again."""

    def __init__(self, sentence: str):
        super().__init__(printable(sentence.rsplit("UserError: ", 1)[-1].strip()))


def differences(there: dict, now: dict, most: int | None = None) -> str:
    """Keys whose values differ, as "key: X there, Y now; ..."; "" where there are none. most: how
    many of them are named."""
    keys = [key for key in dict.fromkeys([*there, *now]) if there.get(key) != now.get(key)]
    return "; ".join(f"{key}: {there.get(key)} there, {now.get(key)} now" for key in keys[:most])


def expanded(path: str) -> Path:
    """With ~ as the home folder; ~nobody stays (pathlib raises a RuntimeError)."""
    return Path(os.path.expanduser(path))


# -------------------------------------------------------------------------------------------------
# Reading files of ours, which a crash or a bad disk may have damaged.


def read_json(path: Path, fix: str = "") -> dict:
    """The JSON object in a file. Raises UserError where there is none, with the fix if given."""
    try:
        return _parse(_read(path))
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({words}){fix and '; '}{fix}.") from error


def read_log(path: Path, is_whole: Callable[[dict], bool]) -> list[dict]:
    """The lines of a log, each a JSON object for which is_whole(it); [] where there is no file.

    Damaged lines are skipped, and one warning counts them. A last line without its end is one that
    a kill cut short: it does not count. Raises UserError where the file cannot be read at all."""
    try:
        lines = _read(path).split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({words}); move it away.") from error
    whole = []
    for line in lines:
        with contextlib.suppress(ValueError):
            if is_whole(found := _parse(line)):
                whole.append(found)
    if damaged := len(lines) - len(whole):
        warn_once(f"{path}: {damaged} of {len(lines)} lines are damaged and were skipped.")
    return whole


def is_step(value) -> bool:
    """Whether a value of a log can be a step."""
    return type(value) is int and value >= 0


def is_number(value) -> bool:
    """Whether it is a finite number, which fits a float (JSON may also hold NaN and 10**400)."""
    return type(value) in (int, float) and abs(value) < 1e300


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # to open a pipe would wait for ever
        raise ValueError("it is no file")
    return path.read_bytes()


def _parse(data: bytes) -> dict:
    """ValueError where these bytes are no JSON object."""
    try:
        found = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found


@functools.cache
def warn_once(sentence: str):
    """Print a warning on rank 0, where it has not been printed before."""
    if os.environ.get("RANK", "0") == "0":
        print(f"Warning: {printable(sentence)}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------
# Writing. What has returned is on the disk: a loss of power leaves what was there, or the new file.


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new path beside `path`, for a file or folder, that takes its place at the end: a kill, a
    loss of power, a full disk or an exception leaves what was there. Processes may race.

    A folder can only take the place of nothing. An OSError without a file name gets this one."""
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        yield scratch
        sync_all(scratch)
        scratch.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def write(path: Path, text: str):
    """Write a text file, or leave what was there."""
    with replacing(path) as scratch:
        scratch.write_bytes(encoded(text))


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # of names of files that are no UTF-8


def sync_all(path: Path):
    """`sync` of a file, or of a folder and all that is in it. Files get the mode that the umask
    asks for: safetensors makes its own 0600, which nobody else may read."""
    for inside in [*path.rglob("*"), path]:
        if inside.is_file() and not inside.is_symlink():
            with contextlib.suppress(PermissionError):  # some file systems have no modes
                inside.chmod(inside.stat().st_mode | 0o666 & ~UMASK)
        sync(inside)


def sync(path: Path):
    """Wait until a file's bytes, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such call
            raise
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Whether there is no room on the disk. Libraries in Rust raise the number in their text."""
    full = errno.ENOSPC, errno.EDQUOT
    return error.errno in full or any(f"os error {number}" in str(error) for number in full)


def set_aside(paths: list[Path]) -> list[Path]:
    """Rename files by the day on which the newest of them was written, table.md for one to
    table-2026-11-25.md; where that is taken, to table-2026-11-25-2.md. Returns their new places."""
    day = date.fromtimestamp(max(path.stat().st_mtime for path in paths))
    for n in itertools.count(1):
        tag = f"-{day}" if n == 1 else f"-{day}-{n}"
        places = [path.with_stem(path.stem + tag) for path in paths]
        if not any(place.exists() for place in places):
            break
    for path, place in zip(paths, places, strict=True):
        path.rename(place)
    return places


def write_section(path: Path, heading: str, text: str):
    """Put `text` under a "## " heading of a Markdown file, in the place of what stands there."""
    old = path.read_text("utf-8") if path.exists() else ""
    found = re.search(rf"^## {re.escape(heading)}\n", old, re.MULTILINE)  # no "###" of that name
    before = old[: found.start()] if found else f"{old.rstrip()}\n\n".lstrip()
    after = old[found.end() :] if found else ""
    rest = after[after.index("\n## ") + 1 :] if "\n## " in after else ""
    write(path, f"{before}## {heading}\n\n{text.strip()}\n" + (f"\n{rest}" if rest else ""))
