"""Odd and damaged inputs for lab/fuzz.py: how they are drawn, made, and used.

A kind has a hypothesis strategy, whose cases are plain values, and a function that makes a case's
files in an empty folder and gives them to a program as a user would. It returns "correct", or
"mismatch: ..." where the program has made something else than it should. A new reader of data gets
a kind of its own, at the end of this file, or in odd_sources.py."""

import functools
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import data
import evaluate
import toy
import train_inpo
from evaluation import prompts, tables

# -------------------------------------------------------------------------------------------------
# Damage: what disks, editors and other programs do to a file.

part = st.floats(0, 1, allow_nan=False)  # a place in a file, from its start to its end
noise = st.binary(min_size=1, max_size=8)
damage = st.one_of(
    st.tuples(st.just("cut"), part),
    st.tuples(st.just("overwrite"), part, noise),
    st.tuples(st.just("insert"), part, noise),
    st.tuples(st.just("remove"), part, st.integers(1, 64)),
    st.tuples(st.just("zero"), part, st.integers(1, 4096)),
)
CONTENTS = (b"", b"\n", b"[]", b"null", b"{}", b"0", b'"text"', b"\0" * 512, b"\xff\xfe\x80", b"{")
replaced = st.one_of(
    st.tuples(st.just("content"), st.sampled_from(CONTENTS)),
    st.tuples(st.sampled_from(("delete", "folder", "loop"))),
)


def rarely(rare: st.SearchStrategy, usual: st.SearchStrategy, times: int) -> st.SearchStrategy:
    """The rare one in one case of `times`; the usual one is the simpler one."""
    return st.sampled_from([usual] * (times - 1) + [rare]).flatmap(lambda chosen: chosen)


def spoil(file: Path, how: tuple):
    """Do to a file what `damage` or `replaced` says."""
    kind, *rest = how
    if kind in ("delete", "folder", "loop"):
        file.unlink()
        if kind == "folder":
            file.mkdir()
        if kind == "loop":
            file.symlink_to(file)
        return
    if kind == "content":
        file.write_bytes(rest[0])
        return
    old, place = file.read_bytes(), int(rest[0] * file.stat().st_size)
    head, tail = old[:place], old[place:]
    new = {
        "cut": lambda: head,
        "overwrite": lambda: head + rest[1] + tail[len(rest[1]) :],
        "insert": lambda: head + rest[1] + tail,
        "remove": lambda: head + tail[rest[1] :],
        "zero": lambda: head + b"\0" * len(tail[: rest[1]]) + tail[rest[1] :],
    }
    file.write_bytes(new[kind]())


# -------------------------------------------------------------------------------------------------
# Pairs: one parquet file of any schema and content, damaged or not.

PICTURES = {  # name: (mode, size, format)
    "png": ("RGB", (20, 16), "PNG"),
    "jpeg": ("RGB", (16, 20), "JPEG"),
    "webp": ("RGB", (16, 16), "WEBP"),
    "transparent": ("RGBA", (16, 16), "PNG"),
    "palette": ("P", (16, 16), "GIF"),
    "bits": ("1", (16, 16), "PNG"),
    "grey": ("L", (16, 16), "PNG"),
    "grey 16": ("I;16", (16, 16), "PNG"),
    "float": ("F", (16, 16), "TIFF"),
    "cmyk": ("CMYK", (16, 16), "JPEG"),
    "line": ("L", (1, 5000), "PNG"),
    "dot": ("RGB", (1, 1), "PNG"),
}


@functools.cache
def bomb() -> bytes:
    """A black picture of 400 million pixels in 50 KB; it takes seconds."""
    Image.new("1", (20000, 20000)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def picture(kind: str, shade: int) -> bytes | None:
    if kind == "none":
        return None
    if kind == "garbage":
        return bytes([shade]) * 50
    if kind == "bomb":
        return bomb()
    if kind == "half":
        return picture("png", shade)[:60]
    mode, size, form = PICTURES[kind]
    if mode in ("F", "I;16"):
        dtype = np.float32 if mode == "F" else np.uint16
        image = Image.fromarray(np.full(size[::-1], shade, dtype))
    else:
        image = Image.new("L", size, shade).convert(mode)
    image.save(buffer := io.BytesIO(), form)
    return buffer.getvalue()


pictures = st.sampled_from(["png", "jpeg"] * 10 + ["none", "garbage", "half", "bomb", *PICTURES])
captions = st.one_of(st.none(), st.text(max_size=12).filter(lambda t: t.isprintable()))
labels = st.sampled_from((0.0, 1.0, 0.0, 1.0, 0.5))
row = st.tuples(pictures, pictures, labels, captions, st.integers(0, 255))
rows = st.lists(row, min_size=1, max_size=6)
CASTS = {  # column: Arrow types it may come in, the usual one first
    "jpg_0": (pa.binary(), pa.large_binary(), "image", pa.string(), pa.list_(pa.binary()), None),
    "label_0": (pa.float64(), pa.float32(), pa.int64(), pa.bool_(), pa.string(), "nulls", None),
    "caption": (pa.string(), pa.large_string(), "dictionary", "list", pa.int64(), "invalid", None),
}
CASTS["jpg_1"] = CASTS["jpg_0"]


def casts(column: str):
    usual, *others = range(len(CASTS[column]))
    return st.sampled_from([usual] * 30 + others)


tables_of_pairs = st.fixed_dictionaries(
    {
        "rows": rarely(st.just([]), rows, 20),
        "casts": st.fixed_dictionaries({name: casts(name) for name in CASTS}),
        "group": st.integers(1, 4),
        "damage": rarely(st.lists(damage, max_size=2), st.just([]), 3),
    }
)


def column(name: str, values: list, kind) -> pa.Array | None:
    if kind is None:
        return None
    if kind == "image":
        return pa.array([v and {"bytes": v, "path": "x.png"} for v in values])
    if kind == "nulls":
        return pa.array([None if i % 2 else v for i, v in enumerate(values)], pa.float64())
    if kind == "dictionary":
        return pa.array(values, pa.string()).dictionary_encode()
    if kind == "list":
        return pa.array([[v or ""] for v in values], pa.list_(pa.string()))
    if kind == "invalid":  # bytes that are no UTF-8, as some writers leave them
        raw = pa.array([b"\xff\xfe" for _ in values], pa.binary())
        return pa.StringArray.from_buffers(len(raw), *raw.buffers()[1:])
    if kind == pa.list_(pa.binary()):
        return pa.array([[v] for v in values], kind)
    if kind == pa.string() and name.startswith("jpg"):
        return pa.array(["text" for _ in values], kind)
    if name == "caption" and kind == pa.int64():
        return pa.array([7 for _ in values], kind)
    if name == "label_0" and kind == pa.string():
        return pa.array([str(v) for v in values], kind)
    if name == "label_0" and kind in (pa.int64(), pa.bool_()):
        return pa.array([v > 0.5 for v in values], pa.bool_()).cast(kind)
    return pa.array(values, kind)


def write_parquet(case: dict, file: Path):
    columns = {
        "jpg_0": [picture(a, shade if a != "bomb" else 0) for a, _, _, _, shade in case["rows"]],
        "jpg_1": [
            picture(b, 255 - shade if b != "bomb" else 0) for _, b, _, _, shade in case["rows"]
        ],
        "label_0": [label for _, _, label, _, _ in case["rows"]],
        "caption": [caption for _, _, _, caption, _ in case["rows"]],
    }
    arrays = {n: column(n, v, CASTS[n][case["casts"][n]]) for n, v in columns.items()}
    table = pa.table({name: array for name, array in arrays.items() if array is not None})
    pq.write_table(table, file, row_group_size=case["group"])
    for how in case["damage"]:
        spoil(file, how)


def parquet(case: dict, folder: Path) -> str:
    file = folder / "pairs.parquet"
    write_parquet(case, file)

    def row(number: int) -> dict:
        """Of the rows that are no ties, as pyarrow reads it, without any code of ours."""
        table = pq.read_table(file, columns=list(CASTS), use_threads=False)
        labels = np.array([float(label) for label in table["label_0"].to_pylist()])
        place = np.flatnonzero(labels != 0.5)[number]
        row = {name: table[name][place].as_py() for name in CASTS}
        return row | {"label_0": labels[place]}

    return train_on(file, row)


def train_on(source: Path, reference: Callable[[int], dict]) -> str:
    """Read pairs as the dry run does, then as training does; compare each with the reference."""
    dry = data.read_pairs(str(source), labels_only=True)
    wet = data.read_pairs(str(source))
    if len(dry) != len(wet):
        return f"mismatch: {len(dry)} pairs in the dry run, {len(wet)} in the run"
    pairs = data.Pairs(wet, 16, seed=0, flip=False, caption_dropout=0)
    for n in range(2 * len(pairs)):
        item = pairs[n]
        row = reference(item["row"])
        images = [row["jpg_0"], row["jpg_1"]]
        images = [image["bytes"] if isinstance(image, dict) else image for image in images]
        best, worst = images if row["label_0"] else reversed(images)
        for name, image in (("winner", best), ("loser", worst)):
            if not item[name].equal(data.preprocess(data.decode(image), 16, None, False)):
                return f"mismatch: the {name} of pair {n} is another picture"
        if item["caption"] != row["caption"]:
            return f"mismatch: pair {n} has the caption '{item['caption']}'"
    return "correct"


# -------------------------------------------------------------------------------------------------
# Pairs: a folder of parquet files among other things. Their captions tell which picture is whose.

NAMES = (
    "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet",
    "train-00000-of-00001.parquet", "a.parquet", "b [1].parquet", "c*?.parquet", "sub/d.parquet",
    "._a.parquet", ".hidden.parquet", "E.PARQUET", "notes.txt", "state.json", "dataset_dict.json",
    "dataset_info.json", "data-00000-of-00001.arrow", "__MACOSX/._a.parquet", "é ü.parquet",
    "f.parquet", "dir/g.parquet",
)  # fmt: skip
WHAT = (*["good"] * 20, "empty", "garbage", "cut", "text", "other", "folder", "loop")
PLACES = ("pairs", "my pairs", "pairs [v2]", "pairs*", "paires é", "pairs.parquet", "a,b=c", "~x")
folders_of_pairs = st.fixed_dictionaries(
    {
        "place": st.sampled_from(PLACES),
        "files": st.dictionaries(st.sampled_from(NAMES), st.sampled_from(WHAT), max_size=5),
    }
)


def folders(case: dict, folder: Path) -> str:
    place = folder / case["place"]
    place.mkdir()
    for number, (name, what) in enumerate(case["files"].items()):
        file = place / name
        file.parent.mkdir(exist_ok=True)
        if what == "folder":
            file.mkdir()
            continue
        if what == "loop":
            file.symlink_to(file.parent)
            continue
        shades = range(30 * number, 30 * number + 4)
        rows = [("png", "png", i % 2, f"shade {shade}", shade) for i, shade in enumerate(shades)]
        casts = dict.fromkeys(CASTS, 0) | ({"caption": 4} if what == "other" else {})
        write_parquet({"rows": rows, "casts": casts, "group": 2, "damage": []}, file)
        if what in ("empty", "garbage", "text"):
            file.write_bytes({"empty": b"", "garbage": b"PAR1" * 9, "text": b"a,b\n1,2\n"}[what])
        if what == "cut":
            spoil(file, ("cut", 0.7))

    dry = data.read_pairs(str(place), labels_only=True)
    wet = data.read_pairs(str(place))
    if len(dry) != len(wet) or len(dry) % 4:
        return f"mismatch: {len(dry)} pairs in the dry run, {len(wet)} in the run"
    pairs, seen = data.Pairs(wet, 16, seed=0, flip=False, caption_dropout=0), set()
    for n in range(len(pairs)):
        item = pairs[n]
        shade = int(item["caption"].removeprefix("shade "))
        winner, loser = (shade, 255 - shade) if shade % 30 % 2 else (255 - shade, shade)
        found = [round(float(item[name].float().mean())) for name in ("winner", "loser")]
        if found != [winner, loser]:
            return f"mismatch: pair {n}, {item['caption']}, has the shades {found}"
        seen.add(shade)
    return "correct" if len(seen) == len(pairs) else "mismatch: a row was read twice"


# -------------------------------------------------------------------------------------------------
# Prompt sets, and what is written of them.

text_files = st.fixed_dictionaries(
    {
        "name": st.sampled_from(("my.txt", "my.tsv", "hpdv2-test=test.json", "parti=p.tsv")),
        "lines": st.lists(
            st.one_of(
                st.text(max_size=20),
                st.sampled_from(
                    ("Prompt\tCategory", "a cat\tAnimals", "[" * 5000, '["a"]', '[{"prompt": "a"}]')
                    + ('["\\ud800"]', "\x1b[2Jcat", "a | b <b>c</b>", "\u202eabc", '[["a"]]', "[1]")
                ),
            ),
            max_size=5,
        ),
        "damage": rarely(st.lists(damage, max_size=2), st.just([]), 2),
    }
)


def prompt_sets(case: dict, folder: Path) -> str:
    name = case["name"].rpartition("=")[2]
    text = "\n".join(case["lines"]).encode("utf-8", "surrogatepass")
    (folder / name).write_bytes(text)
    for how in case["damage"]:
        spoil(folder / name, how)
    found = prompts.read(case["name"].replace(name, str(folder / name)))
    if not found.prompts or not all(isinstance(p, str) and p.strip() for p in found.prompts):
        return "mismatch: an empty prompt"
    "".join(found.prompts).encode()  # a surrogate would raise when it is written
    rows = tables.markdown(["prompt"], [[prompt] for prompt in found.prompts]).splitlines()
    return "correct" if len(rows) == len(found.prompts) + 2 else "mismatch: a table of other rows"


# -------------------------------------------------------------------------------------------------
# Folders of images, judged by evaluate.py.

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 2**40), st.floats(), st.text(max_size=5),
    st.sampled_from(("../secret.png", "/etc/passwd", "00000.png", "\x1b[31m", "a|b", "x" * 5000)),
    st.just([]), st.just({}),
)  # fmt: skip
manifests_of_images = st.fixed_dictionaries(
    {
        "edits": st.lists(st.tuples(st.integers(0, 200), scalars), max_size=3),
        "file": st.sampled_from(("manifest.json", "00000.png", "00001.png")),
        "damage": rarely(st.lists(st.one_of(damage, replaced), max_size=1), st.just([]), 3),
    }
)


def edit(node: Any, place: int, value: Any) -> int:
    """Put `value` at the place-th leaf of nested lists and dictionaries; what is left of place."""
    items = list(enumerate(node) if isinstance(node, list) else node.items())
    for key, child in items:
        if isinstance(child, list | dict) and child and place:
            place = edit(child, place - 1, value)
        elif place == 0:
            node[key] = value
            return -1
        else:
            place -= 1
        if place < 0:
            return place
    return place


def manifests(case: dict, folder: Path) -> str:
    texts = toy.prompts("heldout")[:3]
    for name in ("base", "other"):
        (folder / name).mkdir()
        images = [{"file": f"{k:05d}.png", "prompt": t, "seed": k} for k, t in enumerate(texts)]
        for k, entry in enumerate(images):
            shade = Image.new("RGB", (64, 64), (255, 80 * k, 0))
            shade.save(folder / name / entry["file"])
        content = {"model": name, "set": "toy", "prompts": 3, "steps": 2, "guidance": 1.0}
        content |= {"images": images}
        if name == "other":
            for place, value in case["edits"]:
                edit(content, place % 20, value)
        (folder / name / "manifest.json").write_text(json.dumps(content))
    for how in case["damage"]:
        spoil(folder / "other" / case["file"], how)
    models = [f"{name}={folder / name}" for name in ("base", "other")]
    flags = ["--scorers", "preference", "--out", str(folder / "out"), "--models", *models]
    results = evaluate.main(flags)
    kept = json.loads((folder / "out" / "scores.json").read_text())
    for numbers in next(iter(kept.values()))["scores"].values():
        if len(numbers["preference"]) != len(next(iter(kept.values()))["images"]):
            return "mismatch: not a score for each image"
    return "correct" if results["win_rates"] else "mismatch: nothing was judged"


# -------------------------------------------------------------------------------------------------
# Folders of runs: whatever is damaged, the same command ends with the same weights, or refuses.

files_of_runs = st.fixed_dictionaries(
    {
        "file": st.integers(0, 10**6),
        "half": st.booleans(),  # the run was stopped after its first step
        "how": st.one_of(damage, replaced),
        "again": st.one_of(st.none(), st.tuples(st.integers(0, 10**6), replaced)),
    }
)


def train(folder: Path, out: Path, steps: int):
    train_inpo.main(
        ["--model=tiny", f"--data={folder / 'pairs.parquet'}", f"--out={out}", f"--steps={steps}"]
        + ["--batch=2", "--micro-batch=2", "--warmup=1", "--checkpoint-every=1", "--workers=0"]
        + ["--sample-every=1", "--judge=preference", f"--sample-prompts={folder / 'prompts.txt'}"]
        + ["--inversion-steps=2"]
    )


def prepare_runs(folder: Path):
    """A run of two steps as it ends, and as it is after the first one."""
    rows = [("png", "png", i % 2, toy.prompts()[0], 20 * i) for i in range(6)]
    casts = dict.fromkeys(CASTS, 0)
    write_parquet(
        {"rows": rows, "casts": casts, "group": 2, "damage": []}, folder / "pairs.parquet"
    )
    (folder / "prompts.txt").write_text(toy.prompts("heldout")[0])
    train(folder, folder / "half", 1)
    for name in ("README.md", "model_index.json", "cost.json", "curves.png"):
        (folder / "half" / name).unlink()
    shutil.copytree(folder / "half", folder / "whole")
    train(folder, folder / "whole", 2)


def runs(case: dict, folder: Path, seeds: Path) -> str:
    start, out = seeds / ("half" if case["half"] else "whole"), folder / "run"
    shutil.copytree(start, out)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    file, how = files[case["file"] % len(files)], case["how"]
    if file.suffix == ".safetensors" and how[0] in ("overwrite", "zero"):
        how = ("cut", how[1])  # of finished files the sizes are checked; checkpoints have checksums
    spoil(file, how)
    if case["again"]:
        number, how = case["again"]
        left = [path for path in files if path.is_file()]
        spoil(left[number % len(left)], how)
    train(seeds, out, 2)
    name = "unet/diffusion_pytorch_model.safetensors"
    found, expected = (load_file(place / name) for place in (out, seeds / "whole"))
    same = found.keys() == expected.keys() and all(found[k].equal(expected[k]) for k in found)
    return "correct" if same else "mismatch: other weights"


# -------------------------------------------------------------------------------------------------
# The kinds.


class Kind(NamedTuple):
    cases: st.SearchStrategy
    run: Callable[..., str]
    prepare: Callable[[Path], None] | None = None  # what all cases need, once


TARGETS = {
    "parquet": Kind(tables_of_pairs, parquet),
    "folders": Kind(folders_of_pairs, folders),
    "prompts": Kind(text_files, prompt_sets),
    "manifests": Kind(manifests_of_images, manifests),
    "runs": Kind(files_of_runs, runs, prepare_runs),
}
