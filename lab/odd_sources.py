"""Odd and damaged tables of paths, folders of named pictures and tars, for lab/fuzz.py.

Each source is read twice: by the readers under test, and here by others (pandas, json, GNU tar).
Every pair that the first give must be one of the second's, picture by picture."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pandas as pd
from hypothesis import strategies as st

import data
from lab.odd_inputs import damage, picture, pictures, rarely, spoil

texts = st.one_of(
    st.text("abc ,;\t\"'\n\réü字|=", min_size=1, max_size=12),
    st.sampled_from(("", " ", "a, b", 'say "no"', "two\nlines", "\ufeffstart", "nan", "None", "1")),
)
LABELS = ("1", "0", "1.0", "0.5", "true", "False")
ODD_LABELS = ("", "2", "left", "nan", "-1", "1e0")
rows = st.lists(
    st.tuples(
        pictures,
        pictures,
        rarely(st.sampled_from(ODD_LABELS), st.sampled_from(LABELS), 20),
        texts,
    ),
    min_size=1,
    max_size=6,
)
KINDS = ("a.csv", "a.tsv", "a.jsonl", "a.json", "pairs.csv", "folder", "a.tar", "tars")
sources = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "rows": rows,
        "lost": rarely(st.lists(st.integers(0, 20), max_size=2), st.just([]), 5),
        "damage": rarely(st.lists(damage, min_size=1, max_size=2), st.just([]), 2),
    }
)

NAMES = ("jpg_0", "jpg_1", "label_0", "caption")


def content(kind: str, level: int) -> bytes:
    """A picture of a level that no other one has; b"" for what is none."""
    return picture(kind, level if kind != "bomb" else 0) or b""


def run(case: dict, folder: Path) -> str:
    place = folder / "in"
    place.mkdir()
    cells = [
        (content(a, 20 * i), content(b, 20 * i + 10), label, text)
        for i, (a, b, label, text) in enumerate(case["rows"])
    ]
    named = case["kind"] in ("folder", "a.tar", "tars")
    source = write_named(case["kind"], cells, place) if named else write(case["kind"], cells, place)
    files = sorted(path for path in place.rglob("*") if path.is_file())
    for number in case["lost"]:
        if files[number % len(files)] != source:
            files[number % len(files)].unlink(missing_ok=True)
    for how in case["damage"]:
        spoil(source if source.is_file() else files[-1], how) if files[-1].exists() else None

    found = data.read_pairs(
        str(place if case["kind"] in ("pairs.csv", "folder", "tars") else source)
    )
    pairs = data.Pairs(found, 16, seed=0, flip=False, caption_dropout=0)
    expected = [key(*one) for one in (read_named(case, place) if named else read(source))]
    for n in range(len(pairs)):
        item = pairs[n]
        mine = (item["caption"], pixels(item["winner"]), pixels(item["loser"]))
        if mine not in expected:
            return f"mismatch: pair {n}, {item['caption']!r}, is none that the source has"
    return "correct"


def pixels(image) -> bytes:
    return image.numpy().tobytes()


def key(caption: str, winner: bytes, loser: bytes) -> tuple[str, bytes, bytes]:
    """What a pair is in a batch; pictures that are none can be in no batch."""
    try:
        both = [data.preprocess(data.decode(one), 16, None, False) for one in (winner, loser)]
    except Exception:
        return caption, b"", b""
    return caption, *map(pixels, both)


def write(kind: str, cells: list[tuple], place: Path) -> Path:
    """A table of paths."""
    lines = []
    for i, (first, second, label, text) in enumerate(cells):
        for j, one in enumerate((first, second)):
            (place / f"{i}-{j}.png").write_bytes(one)
        lines.append(dict(zip(NAMES, (f"{i}-0.png", f"{i}-1.png", label, text), strict=True)))
    file = place / kind
    if file.suffix == ".json":
        file.write_text(json.dumps(lines))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        comma = "\t" if file.suffix == ".tsv" else ",;"[len(cells) % 2]
        pd.DataFrame(lines).to_csv(file, sep=comma, index=False)
    return file


def read(file: Path) -> list[tuple[str, bytes, bytes]]:
    """The pairs of a table, by pandas or json."""
    if file.suffix == ".json":
        lines = json.loads(file.read_text("utf-8-sig"))
    elif file.suffix == ".jsonl":
        lines = [json.loads(x) for x in file.read_text("utf-8-sig").split("\n") if x.strip()]
    else:
        head = file.read_bytes().split(b"\n")[0]
        comma = "\t" if file.suffix == ".tsv" else max(",;\t", key=lambda c: head.count(c.encode()))
        frame = pd.read_csv(
            file, sep=comma, dtype=str, keep_default_na=False, on_bad_lines="skip",
            index_col=False, encoding="utf-8-sig",
        )  # fmt: skip
        lines = frame.rename(columns=str.strip).to_dict("records")
    found = []
    for line in lines:
        paths = [file.parent / str(line.get(name)) for name in NAMES[:2]]
        both = [path.read_bytes() if path.is_file() else b"" for path in paths]
        won = str(line.get("label_0")).strip().lower() in ("1", "1.0", "true", "1e0", "jpg_0")
        found.append((line.get("caption"), *(both if won else both[::-1])))
    return found


def write_named(kind: str, cells: list[tuple], place: Path) -> Path:
    """Files by their names, in a folder or in one or two tars; the first picture is the winner."""
    tars: dict[Path, list] = {}
    for i, (first, second, _, text) in enumerate(cells):
        parts = {"winner.png": first, "loser.png": second, "txt": text.encode()}
        for name, one in parts.items():
            if kind == "folder":
                (place / (f"{i}.{name}" if name == "txt" else f"{i}_{name}")).write_bytes(one)
            else:
                tar = place / ("a.tar" if kind == "a.tar" else f"{i % 2}.tar")
                tars.setdefault(tar, []).append((f"{i}.{name}", one))
    for file, members in tars.items():
        with tarfile.open(file, "w") as tar:
            for name, one in members:
                about = tarfile.TarInfo(name)
                about.size = len(one)
                tar.addfile(about, io.BytesIO(one))
    return next(iter(tars), place)


def read_named(case: dict, place: Path) -> list[tuple[str, bytes, bytes]]:
    """The pairs of a folder, or of what GNU tar takes out of the tars."""
    folders, winner = [place], "{}_winner.png"
    if case["kind"] != "folder":
        folders, winner = [], "{}.winner.png"
        for file in sorted(place.glob("*.tar")):
            folders.append(place / f"of {file.name}")
            folders[-1].mkdir()
            options = {"stdin": subprocess.DEVNULL, "capture_output": True}
            subprocess.run(["tar", "xf", str(file), "-C", str(folders[-1])], **options)
    found = []
    for folder in folders:
        for text in folder.rglob("*.txt"):
            both = [text.with_name(winner.format(text.stem).replace("winner", one)) for one in
                    ("winner", "loser")]  # fmt: skip
            caption = text.read_bytes().decode("utf-8-sig", "replace").strip()
            found.append((caption, *(x.read_bytes() if x.is_file() else b"" for x in both)))
    return found
