"""Work of hours in parts: what a kill leaves is kept, and ranks share the rest.

    FOLDER/about.json        what decides the values
    FOLDER/00000.json ...    {values: of PART numbers, from PART times the file's own number on}

Part n is rank n mod world's. What a value is does not depend on the number of ranks, since a part
is always done as a whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from system import processes
from system.files import UserError, differences, read_json, write
from system.lock import delete_unfinished

PART = 64  # numbers of a file: at most that many pairs are judged again after a kill


def spans(count: int) -> list[range]:
    return [range(start, min(start + PART, count)) for start in range(0, count, PART)]


def file_of(folder: Path, part: range) -> Path:
    return folder / f"{part.start // PART:05d}.json"


def work_in_parts(
    folder: Path, about: dict, count: int, work: Callable[[range], list], progress: str
):
    """Write the parts of 0..count-1 that are not there (collective).

    work(numbers) -> a JSON value of each. Raises UserError where the folder holds values of another
    `about`. A rank that fails leaves a file `failed`, so that the others are told at once."""
    failed = folder / "failed"

    def start():
        folder.mkdir(parents=True, exist_ok=True)
        kept, fix = folder / "about.json", "name another --out, or delete that folder"
        if kept.exists():
            if differ := differences(read_json(kept, fix), about, 5):
                raise UserError(f"'{folder}' holds values of another command ({differ}); {fix}.")
        else:
            write(kept, json.dumps(about, ensure_ascii=False) + "\n")
        failed.unlink(missing_ok=True)
        delete_unfinished(folder)

    def do():
        mine = spans(count)[processes.rank() :: processes.world()]
        missing = [part for part in mine if not file_of(folder, part).is_file()]
        for part in tqdm(missing, desc=progress, unit="part", disable=not processes.is_main()):
            if failed.exists():
                return
            try:
                values = work(part)
            except BaseException:
                failed.touch()
                raise
            write(file_of(folder, part), json.dumps({"values": values}) + "\n")

    processes.on_main(start)
    processes.together(do)


def read_parts(folder: Path, count: int) -> list[Any]:
    """The values of 0..count-1, once all parts are there."""
    found = []
    for part in spans(count):
        file = file_of(folder, part)
        values = read_json(file, fix := "delete it and repeat the command").get("values")
        if not isinstance(values, list) or len(values) != len(part):
            raise UserError(f"'{file}' is damaged: it has no list of {len(part)} values; {fix}.")
        found += values
    return found
