"""Files, and the mistakes that a user can set right: one error, one atomic write.

Nothing here takes long to import, so that programs can answer --help and wrong flags at once.
"""

import contextlib
import itertools
import secrets
import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]  # the folder of train_inpo.py

# -------------------------------------------------------------------------------------------------
# Mistakes.


class UserError(ValueError):
    """What a user can set right: one sentence with the file, row or flag, and the fix.

    torch's DataLoader rebuilds a worker's exception from the text of its traceback; the sentence is
    cut out of that text again."""

    def __init__(self, sentence: str):
        super().__init__(sentence.rsplit("UserError: ", 1)[-1].strip())


def differences(there: dict, now: dict, most: int | None = None) -> str:
    """Keys whose values differ, as "key: X there, Y now; ..."; "" where there are none. most: how
    many of them are named."""
    keys = [key for key in dict.fromkeys([*there, *now]) if there.get(key) != now.get(key)]
    return "; ".join(f"{key}: {there.get(key)} there, {now.get(key)} now" for key in keys[:most])


# -------------------------------------------------------------------------------------------------
# Writing.


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new path beside `path`, for a file or folder, that takes its place at the end: a kill, a
    full disk or an exception leaves what was there. Processes may race.

    A folder can only take the place of nothing. An OSError without a file name gets this one."""
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        yield scratch
        scratch.replace(path)
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
        scratch.write_text(text, "utf-8")


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
    before, found, after = old.partition(f"## {heading}\n")
    rest = after[after.index("\n## ") + 1 :] if "\n## " in after else ""
    before = before if found else f"{before.rstrip()}\n\n".lstrip()
    write(path, f"{before}## {heading}\n\n{text.strip()}\n" + (f"\n{rest}" if rest else ""))
