"""Pairs by their names, NAME_winner.png, NAME_loser.png and NAME.txt: in a folder, or in tars.

    source = in_folder(Path("pictures"))    # NAME_winner.EXT, NAME_loser.EXT, NAME.txt
    source = in_tars([Path("000.tar")])     # KEY.winner.EXT, KEY.loser.EXT, KEY.txt: webdataset's

A folder is searched recursively. Of a tar only an index of its members is made, once, and kept in
the cache; pictures are read at their places. What lacks one of the three is left out, and counted.
"""

import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sources.columns import recognise
from sources.mapped import folder, mapped
from sources.pictures import SUFFIXES
from sources.rows import Source
from system.files import UserError, read_json, write

if TYPE_CHECKING:  # imported where it is used, since it takes a second
    pass

PARTS = ("winner", "loser", "txt")
IN_FOLDER = re.compile(r"(?P<name>.+)[_-](?P<part>winner|loser)")  # of a stem
LONGEST = 2**16  # bytes of a caption
END = b"\0" * tarfile.BLOCKSIZE


def in_folder(path: Path) -> Source | None:
    """The pairs of a folder, sorted by name; None where it has no NAME_winner.EXT."""
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(path.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        if file.suffix.lower() in SUFFIXES and (match := IN_FOLDER.fullmatch(file.stem)):
            _add(found, str(file.parent / match["name"]), match["part"], file)
    if not any("winner" in one for one in found.values()):
        return None
    for name, one in found.items():
        if (text := Path(f"{name}.txt")).is_file():
            one["txt"] = text
    rows = {part: [] for part in PARTS}
    for one in _whole(found):
        rows["winner"].append({"path": str(one["winner"].absolute())})
        rows["loser"].append({"path": str(one["loser"].absolute())})
        rows["txt"].append(_caption(one["txt"].read_bytes()))
    return _source(rows, [str(path)] * len(rows["txt"]), found, path, "_winner, _loser and .txt")


def in_tars(files: list[Path]) -> Source:
    """The pairs of tars, in their order."""
    rows, origins, every = {part: [] for part in PARTS}, [], {}
    for file in tqdm(files, desc="Indexing tars", unit="file", delay=2):
        found: dict[str, dict[str, tuple]] = {}
        for name, start, size in _index(file):
            key, *rest = Path(name).name.split(".", 1)
            part = rest[0].split(".")[0].lower() if rest else ""
            if part in PARTS:
                _add(found, str(Path(name).parent / key), part, (start, size))
        with open(file, "rb") as opened:
            for one in _whole(found):
                for part in ("winner", "loser"):
                    start, size = one[part]
                    rows[part].append({"path": str(file.absolute()), "start": start, "size": size})
                opened.seek(one["txt"][0])
                rows["txt"].append(_caption(opened.read(min(one["txt"][1], LONGEST + 1))))
                origins.append(str(file))
        every |= {f"{file}: {key}": one for key, one in found.items()}
    where = files[0] if len(files) == 1 else files[0].parent
    return _source(rows, origins, every, where, ".winner.EXT, .loser.EXT and .txt")


def _add(found: dict[str, dict[str, Any]], name: str, part: str, place: Any):
    one = found.setdefault(name, {})
    if part in one:
        raise UserError(f"{name} has two pictures called {part}; remove one of them.")
    one[part] = place


def _whole(found: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (one for one in found.values() if all(part in one for part in PARTS))


def _caption(data: bytes) -> str | None:
    """None for what is no UTF-8, or too long to be one."""
    try:
        return data.decode("utf-8-sig").strip() if len(data) <= LONGEST else None
    except UnicodeDecodeError:
        return None


def _source(rows: dict, origins: list[str], found: dict, where: Path, names: str) -> Source:
    import pyarrow as pa

    partial = [name for name, one in found.items() if not all(part in one for part in PARTS)]
    if not origins:
        some = f", as {partial[0]}" if partial else ""
        raise UserError(f"{where} has no pair left: no name has all of {names}{some}.")
    kinds = [pa.string(), pa.int64(), pa.int64()]
    place = pa.struct([*zip(("path", "start", "size"), kinds, strict=True)])
    arrays = {"winner": pa.array(rows["winner"], place), "loser": pa.array(rows["loser"], place)}
    table = pa.table(arrays | {"caption": pa.array(rows["txt"], pa.string())})
    columns = recognise(table.column_names, str(where))
    note = f"{len(partial)} names lack one of {names}, as {partial[0]}" if partial else ""
    return Source(
        where=str(where),
        columns=columns,
        judged=table.select(columns.judged),
        files=dict(Counter(origins)),
        root=Path(where),
        table=lambda: mapped(table.select(columns.read)),
        note=note,
    )


def _index(file: Path) -> list[tuple[str, int, int]]:
    """(name, start, size) of the members of a tar that are files. Raises UserError."""
    about = file.stat()
    named = f"{file.absolute()} {about.st_size} {about.st_mtime_ns}"
    kept = folder() / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.json"
    if kept.exists():
        return read_json(kept, "delete it")["members"]
    try:
        with tarfile.open(file, "r:") as tar:
            members = [(one.name, one.offset_data, one.size) for one in tar if one.isreg()]
            tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header for the end
            whole = tar.fileobj.read(len(END)) in (END, b"")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} is no whole tar ({error}); copy it again.") from error
    if not whole:
        raise UserError(f"{file} is damaged after {len(members)} members; copy it again.")
    kept.parent.mkdir(parents=True, exist_ok=True)
    write(kept, json.dumps({"members": members}))
    return members
