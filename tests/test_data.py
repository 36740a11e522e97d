"""Laws of data.py. Row i of these data has red level i; its winner is green, its loser blue.

Solid pictures, so that any pixel tells row and role."""

import io
import itertools
import multiprocessing.reduction
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFile, TiffImagePlugin

import data
from data import Pairs, collate, loader, pair_numbers, preprocess, read_pairs
from sources.pictures import FORMATS
from system.files import UserError

ROWS, SIZE = 12, 16
LABELS = (1.0, 0.0, 0.5, 0.0, 1.0, 1.0)  # of rows 0, 1, 2, ..., repeated: one in six is a tie


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """datasets keeps its cache in a folder of the test, and is quiet."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    datasets.disable_progress_bars()


def encode(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def solid(*color, size=(SIZE, SIZE)):
    return encode(Image.new("RGB", size, color))


def columns(n=ROWS, first=0, labels=LABELS):
    """Columns of n rows from row `first` on."""
    table = {"jpg_0": [], "jpg_1": [], "label_0": [], "caption": []}
    for i in range(first, first + n):
        label = labels[i % len(labels)]
        winner, loser = solid(i, 255, 0), solid(i, 0, 255)
        table["jpg_0"].append(loser if label == 0 else winner)
        table["jpg_1"].append(winner if label == 0 else loser)
        table["label_0"].append(label)
        table["caption"].append(f"row {i}")
    return table


def parquet(path, table, rows=None):
    """Writes the table in groups of so many rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path, row_group_size=rows)
    return str(path)


def dataset_of(table):
    return datasets.Dataset.from_dict(table, features=FEATURES)


BYTES, TEXT = datasets.Value("binary"), datasets.Value("string")
OTHERS = {"label_0": datasets.Value("float64"), "caption": TEXT}
FEATURES = datasets.Features({"jpg_0": BYTES, "jpg_1": BYTES, **OTHERS})
PICTURES = datasets.Features({"jpg_0": datasets.Image(), "jpg_1": datasets.Image(), **OTHERS})


def source_of(kind, folder, table=None):
    """The rows in one of the forms that read_pairs takes, with a column more than it needs."""
    table = table or columns()
    table["uid"] = [str(i) for i in range(len(table["caption"]))]
    if kind == "file":
        return parquet(folder / "pairs.parquet", table)
    if kind == "folder":
        half = len(table["caption"]) // 2
        parquet(folder / "a" / "1.parquet", {k: v[:half] for k, v in table.items()})
        parquet(folder / "b" / "0.parquet", {k: v[half:] for k, v in table.items()})
        parquet(folder / "b" / "1.parquet", pa.table(table).slice(0, 0))  # no rows
        return str(folder)
    features = datasets.Features((PICTURES if "image" in kind else FEATURES) | {"uid": TEXT})
    if "image" in kind:
        for name in ("jpg_0", "jpg_1"):
            table[name] = [b if b is None else {"bytes": b, "path": None} for b in table[name]]
    dataset = datasets.Dataset.from_dict(table, features=features)
    if kind == "image file":
        dataset.to_parquet(folder / "pairs.parquet")
        return str(folder / "pairs.parquet")
    if kind == "arrow dict":
        dataset = datasets.DatasetDict({"test": dataset.select([0]), "train": dataset})
    dataset.save_to_disk(folder / "saved")
    return str(folder / "saved")


KINDS = ("file", "folder", "image file", "arrow", "arrow dict", "arrow image")


def levels(images):
    """(P, 3) colour levels 0..255 of solid images (P, 3, R, R)."""
    assert images.dtype == torch.uint8 and images.amax((2, 3)).equal(images.amin((2, 3)))
    return images.amax((2, 3)).int()


# --------------------------------------------------------------------------------------------------
# Reading.


@pytest.mark.parametrize("kind", KINDS)
def test_winners_and_losers_are_not_swapped_from_source_to_batch(kind, tmp_path):
    pairs = Pairs(read_pairs(source_of(kind, tmp_path)), SIZE, seed=0, caption_dropout=0)
    (batch,) = loader(pairs, 0, 1, rank=0, world=1, micro_batch=len(pairs), accumulation=1)
    decided = [i for i in range(ROWS) if LABELS[i % 6] != 0.5]
    seen = [int(caption.split()[1]) for caption in batch["captions"]]
    assert sorted(seen) == decided  # labels 0 and 1 both occur, ties do not
    winners, losers = levels(batch["pixels"]).chunk(2)
    assert winners.tolist() == [[i, 255, 0] for i in seen]
    assert losers.tolist() == [[i, 0, 255] for i in seen]


def test_ties_are_removed_and_counted(tmp_path):
    dataset = read_pairs(source_of("file", tmp_path))
    assert len(dataset) == ROWS - 2 and set(dataset.labels) == {0, 1}
    assert dataset.description.startswith("10 pairs; 2 of 12 rows are ties")


def test_reading_decodes_nothing_and_maps_the_file(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an image was decoded")

    sources = [source_of(kind, tmp_path / kind) for kind in ("image file", "folder")]
    monkeypatch.setattr(Image, "open", refuse)
    for source in sources:
        dataset = read_pairs(source)
        assert dataset.table.cache_files
        assert isinstance(dataset[0]["jpg_0"], bytes)


def test_hidden_preference_of_the_toy_agrees_with_its_pairs(tmp_path):
    toy = pytest.importorskip("toy")
    dataset = read_pairs(str(toy.write_pairs(tmp_path / "pairs.parquet", 8, seed=1)))
    pairs = Pairs(dataset, toy.SIZE, seed=0, flip=False)
    for n in range(len(pairs)):
        item = pairs[n]
        scores = []
        for side in ("winner", "loser"):
            pixels = item[side].permute(1, 2, 0).numpy()
            scores.append(toy.preference(Image.fromarray(pixels)))
        assert scores[0] > scores[1]


def test_folder_with_hub_names_gives_only_its_split(tmp_path):
    for k in range(2):
        parquet(tmp_path / "data" / f"train-0000{k}-of-00002.parquet", columns(3, first=3 * k))
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", columns(3, first=6))
    train, test = read_pairs(str(tmp_path)), read_pairs(str(tmp_path), "test")
    assert [train[k]["caption"] for k in range(5)] == [f"row {i}" for i in (0, 1, 3, 4, 5)]
    assert [test[k]["caption"] for k in range(2)] == ["row 6", "row 7"]
    assert (len(train), len(test)) == (5, 2)
    with pytest.raises(UserError, match="no pairs of split 'validation', it holds test, train"):
        read_pairs(str(tmp_path), "validation")


def test_fingerprint_depends_on_the_rows_alone(tmp_path):
    prints = {
        data.fingerprint(read_pairs(source_of(kind, tmp_path / str(i))))
        for i, kind in enumerate(KINDS)
    }
    assert len(prints) == 1 and len(prints.pop()) == 16
    base = columns()
    changed = [columns(11), {**base, "label_0": [0.0] + base["label_0"][1:]}]
    changed += [{**base, "caption": ["else"] + base["caption"][1:]}]
    changed += [{**base, "jpg_1": [solid(9, 9, 9)] + base["jpg_1"][1:]}]
    sources = [
        parquet(tmp_path / f"{i}.parquet", table) for i, table in enumerate([base, *changed])
    ]
    assert len({data.fingerprint(read_pairs(source)) for source in sources}) == 5


# --------------------------------------------------------------------------------------------------
# What is wrong with a source is said in one sentence.


def without(name):
    return {key: value for key, value in columns().items() if key != name}


def spoiled(name, row, value):
    table = columns()
    table[name][row] = value
    return table


def truncated(path):
    parquet(path, columns())
    path.write_bytes(path.read_bytes()[:-40])


def torn(path):
    """Whole footer and labels, but no image data behind them, as a broken download leaves it."""
    parquet(path, columns())
    path.write_bytes(path.read_bytes()[:4] + bytes(200) + path.read_bytes()[204:])


def saved(data, folder):
    data.save_to_disk(folder / "saved")
    return folder / "saved"


def garbage(folder):
    (folder / "b.parquet").write_text("no parquet")


def text(folder):
    (folder / "pairs.txt").write_text("caption,label_0\n")
    return folder / "pairs.txt"


# What is wrong: a table, written to b.parquet beside a good a.parquet, or a function of the folder
# that spoils it, and may return a source of its own; then words of the sentence.
NOTHING = "there is no file or folder of that name here"
TESTS_ONLY, LABEL_03 = datasets.DatasetDict(test=dataset_of(columns())), spoiled("label_0", 7, 0.3)
CASES = {
    "no such path": (lambda _: "out/toy/pairs/x", f"'out/toy/pairs/x': {NOTHING}; give", "hub id"),
    "no such file": (
        lambda _: "nowhere/pairs.parquet",
        f"{NOTHING}; give a .parquet, .csv, .tsv, ",
    ),
    "no label": (without("label_0"), "b.parquet has no column 'label_0', it has jpg_0, jpg_1, cap"),
    "no image": (without("jpg_1"), "b.parquet has no column 'jpg_1'"),
    "numbers": (columns() | {"jpg_0": [1] * ROWS}, "'jpg_0'", "int64, it must hold pictures"),
    "no captions": (columns() | {"caption": [1] * ROWS}, "'caption'", "must hold text"),
    "no parquet": (garbage, "b.parquet is no readable parquet"),
    "truncated": (lambda path: truncated(path / "b.parquet"), "b.parquet is no readable parquet"),
    "torn": (lambda folder: torn(folder / "b.parquet"), "Cannot read the pairs"),
    "empty folder": (lambda folder: folder.parent, "it holds no pairs that are known."),
    "another kind": (
        text,
        "pairs.txt is a .txt file; pairs are read from a .parquet, .csv, .tsv, .jsonl",
    ),
    "other kinds": (lambda folder: text(folder).parent.parent, "that are known, but .txt files."),
    "label": (spoiled("label_0", 7, 2.0), "Row 7", "b.parquet", "label_0 2.0"),
    "no number": (spoiled("label_0", 5, None), "Row 5", "b.parquet", "label_0 None"),
    "text label": (columns() | {"label_0": ["1.0"] * ROWS}, "hold labels of several types"),
    "listed captions": (columns() | {"caption": [["a"]] * ROWS}, "'caption'", "must hold text"),
    "listed images": (columns() | {"jpg_0": [[b"a"]] * ROWS}, "'jpg_0'", "must hold pictures"),
    "a file is lacking": (
        lambda folder: parquet(folder / "train-00000-of-00006.parquet", columns()) and None,
        "holds 1 of the 6 files of split 'train': train-00001-of-00006, train-00002-of-00006, ",
        "train-00003-of-00006 and 2 more missing",
        "--partial-data",
    ),
    "two copies": (
        lambda folder: (
            [
                parquet(folder / f"train-00000-of-00001{hash}.parquet", columns())
                for hash in ("-a", "")
            ]
            and None
        ),
        "files of two copies of split 'train'",
        "train-00000-of-00001-a.parquet",
    ),
    "colons": (lambda folder: parquet(folder / "a::b.parquet", columns()), "rename what has '::'"),
    "saved label": (lambda folder: saved(dataset_of(LABEL_03), folder), "Row 7", "0.3"),
    "ties only": (columns(labels=(0.5,)), "no pair left", "24 of 24 rows are ties"),
    "no rows": (pa.table(columns()).slice(0, 0), "no pair left", "no rows"),
    "no split": (lambda folder: saved(TESTS_ONLY, folder), "no split 'train', it has test"),
    "half saved": (lambda folder: (folder / "state.json").touch(), "datasets has saved"),
    "hub": (lambda _: "owner/pairs", f"'owner/pairs': {NOTHING}, and the hub cannot be reached"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_source_that_cannot_be_used_is_one_clear_sentence(case, tmp_path, monkeypatch):
    wrong, *words = CASES[case]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    source = folder
    if case not in ("empty folder", "other kinds"):
        good = {"ties only": columns(labels=(0.5,)), "no rows": wrong}.get(case, columns())
        parquet(folder / "a.parquet", good)
    if case in ("a file is lacking", "two copies"):
        (folder / "a.parquet").unlink()
    if callable(wrong):
        source = wrong(folder) or folder
    else:
        parquet(folder / "b.parquet", wrong)
    with pytest.raises(UserError) as caught:
        read_pairs(str(source))
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message
    assert len(message.replace(str(folder), "")) < 230


def copies():
    return sorted(datasets.config.HF_DATASETS_CACHE.rglob("*.arrow"))


@pytest.mark.parametrize("kind", ["file", "folder", "image file"])
def test_labels_alone_count_the_same_pairs_and_copy_nothing(kind, tmp_path):
    source, others = source_of(kind, tmp_path), columns(labels=LABELS[::-1])
    labels = read_pairs(source, labels_only=True)
    assert labels.table is None and not copies()
    copied = read_pairs(source)
    assert labels.labels.tolist() == copied.labels.tolist()
    assert labels.description == copied.description
    others = read_pairs(source_of(kind, tmp_path / "others", others), labels_only=True)
    assert len({data.fingerprint(rows) for rows in (labels, others, copied)}) == 3


def test_a_disk_without_room_for_the_copy_is_said_before_anything_is_copied(tmp_path, monkeypatch):
    table = columns()
    table["jpg_0"] = [os.urandom(50_000) for _ in range(ROWS)]  # 0.6 MB
    table["uid"] = [os.urandom(10**5) for _ in range(ROWS)]  # is not read, nor copied
    source = parquet(tmp_path / "pairs.parquet", table, rows=5)
    free = 590_000

    def disk_usage(path):
        assert Path(path) == datasets.config.HF_DATASETS_CACHE
        return shutil._ntuple_diskusage(10**9, 10**9 - free, free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(UserError) as caught:
        read_pairs(source)
    message = str(caught.value)
    assert message.startswith(f"{source} needs 0.00060") and message.count(". ") == 0
    for words in (f"{datasets.config.HF_DATASETS_CACHE} has 0.00059 GB free", "HF_HOME"):
        assert words in message
    assert not copies() and len(read_pairs(source, labels_only=True)) == ROWS - 2
    free = 620_000
    assert len(read_pairs(source)) == ROWS - 2 and copies()
    free = 0  # the copy is there
    assert len(read_pairs(source)) == ROWS - 2


def test_what_is_copied_already_counts_as_room(tmp_path, monkeypatch):
    """A rank that waits for another's copy must not take that for a full disk."""
    source = parquet(tmp_path / "pairs.parquet", columns())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(UserError, match="0 GB free"):
        read_pairs(source)
    found = data.parquet.read(Path(source), "train", False, {})
    builder = data.parquet.builder_of(found.columns, {source: found.judged})
    part = Path(f"{builder.cache_dir}.incomplete")
    part.mkdir(parents=True)
    (part / "pairs-train-00000-of-00001.arrow").write_bytes(bytes(10**5))
    assert len(read_pairs(source)) == ROWS - 2


def image_cell(value):
    return {"bytes": value, "path": None}


def decimals(values):
    return pa.array([None if v is None else Decimal(str(v)) for v in values], pa.decimal128(3, 1))


def as_type(kind):
    return lambda values: pa.array(values, kind)


# Columns of the second file of a folder, of other Arrow types than those of the first.
OTHERS_KINDS = {
    "images": {"jpg_0": lambda values: pa.array([*map(image_cell, values)])},
    "large": {"jpg_1": as_type(pa.large_binary()), "caption": as_type(pa.large_string())},
    "views": {"jpg_1": as_type(pa.binary_view()), "caption": as_type(pa.string_view())},
    "dictionaries": {"caption": lambda values: pa.array(values).dictionary_encode()},
    "float32": {"label_0": as_type(pa.float32())},
    "decimals": {"label_0": decimals},
    "integers": {"label_0": lambda values: pa.array([int(v > 0.5) for v in values])},
    "booleans": {"label_0": lambda values: pa.array([v > 0.5 for v in values])},
}


@pytest.mark.parametrize("other_first", [True, False])
@pytest.mark.parametrize("kind", OTHERS_KINDS)
def test_what_the_dry_run_accepts_the_run_accepts_files_of_different_kinds(
    kind, other_first, tmp_path
):
    other = columns(first=ROWS, labels=(1.0, 0.0))
    other |= {name: convert(other[name]) for name, convert in OTHERS_KINDS[kind].items()}
    for name, table in zip("ba" if other_first else "ab", (columns(), other), strict=True):
        parquet(tmp_path / f"{name}.parquet", table)
    labels = read_pairs(str(tmp_path), labels_only=True)
    captions, broken = data.sample(labels, SIZE)
    assert len(captions) == 22 and not broken
    rows = read_pairs(str(tmp_path))
    assert rows.labels.tolist() == labels.labels.tolist() and len(rows) == 22
    pairs = Pairs(rows, SIZE, seed=0, caption_dropout=0)
    for n in range(22):
        level = int(pairs[n]["caption"].split()[1])
        assert levels(pairs[n]["winner"][None]).tolist() == [[level, 255, 0]]
        assert levels(pairs[n]["loser"][None]).tolist() == [[level, 0, 255]]


def test_a_file_of_a_split_that_lacks_others_is_taken_with_partial(tmp_path):
    parquet(tmp_path / "train-00001-of-00002-abc.parquet", columns())
    with pytest.raises(UserError, match="train-00000-of-00002 missing"):
        read_pairs(str(tmp_path))
    assert len(read_pairs(str(tmp_path), partial=True)) == ROWS - 2
    parquet(tmp_path / "train-00000-of-00002-def.parquet", columns())
    assert len(read_pairs(str(tmp_path))) == 2 * (ROWS - 2)


def test_hidden_files_and_folders_named_like_files_are_no_data(tmp_path):
    parquet(tmp_path / "x.parquet" / "part-0.parquet", columns())  # as Spark writes
    (tmp_path / "x.parquet" / "._part-0.parquet").write_bytes(b"\0\5\26\7")  # as a Mac leaves
    garbage_there = tmp_path / ".cache" / "y.parquet"
    garbage_there.parent.mkdir()
    garbage_there.write_text("no parquet")
    assert len(read_pairs(str(tmp_path))) == len(read_pairs(str(tmp_path / "x.parquet"))) == 10
    with pytest.raises(UserError, match="pipe.parquet is a .parquet file"):
        os.mkfifo(tmp_path / "pipe.parquet")
        read_pairs(str(tmp_path / "pipe.parquet"))


@pytest.mark.parametrize("name", ["a [1]", "b*", "c?", "d#e%20", "**", "{x}"])
@pytest.mark.parametrize("kind", ["file", "folder", "arrow"])
def test_any_path_can_be_read(kind, name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    source = source_of(kind, tmp_path / name)
    for path in (source, Path(source).relative_to(tmp_path / name)):
        assert len(read_pairs(str(path))) == ROWS - 2


def replaced(source, **changes):
    """The file is replaced by one of the same time."""
    times = os.stat(source).st_atime_ns, os.stat(source).st_mtime_ns
    parquet(Path(source), columns() | changes)
    os.utime(source, ns=times)


def test_rows_of_a_replaced_file_of_the_same_time_are_not_those_of_the_old_one(tmp_path):
    source = source_of("file", tmp_path)
    before, labels = read_pairs(source), [1.0 - v for v in columns()["label_0"]]
    for change in (
        {"label_0": labels},
        {"caption": [f"ROW {i}" for i in range(ROWS)]},
        {"jpg_0": columns()["jpg_1"]},
    ):
        replaced(source, **change)
        after = read_pairs(source)
        assert data.fingerprint(after) != data.fingerprint(before)
        for name in change:
            assert [row[name] for row in map(after.__getitem__, range(10))] != [
                row[name] for row in map(before.__getitem__, range(10))
            ]


@pytest.mark.parametrize("left", [0, 0.3, 0.9, "its end", "no file", "another's"])
def test_a_damaged_cache_is_named_with_the_folder_to_delete(left, tmp_path):
    source = source_of("file", tmp_path)
    size = len(read_pairs(source))
    (copy,) = copies()
    whole = copy.read_bytes()
    if left == "no file":
        copy.unlink()
    elif left == "another's":
        read_pairs(source_of("file", tmp_path / "other", columns(ROWS, labels=(0.0,))))
        (other,) = set(copies()) - {copy}
        shutil.copy(other, copy)
    else:
        copy.write_bytes(whole[: -8 if left == "its end" else int(left * len(whole))])
    if left == "its end":  # the mark of the end alone, which nobody needs
        assert len(read_pairs(source)) == size
        return
    with pytest.raises(UserError) as caught:
        read_pairs(source)
    message = str(caught.value)
    assert message.startswith(f"The copy of {source} in the Arrow cache is damaged (")
    assert f"delete the folder {copy.parent} and repeat" in message and "\n" not in message
    shutil.rmtree(copy.parent)
    assert len(read_pairs(source)) == size


def test_nothing_is_cached_before_the_last_file_is_checked(tmp_path):
    parquet(tmp_path / "a.parquet", columns())
    parquet(tmp_path / "b.parquet", without("caption"))
    with pytest.raises(UserError):
        read_pairs(str(tmp_path))
    assert not copies()


# --------------------------------------------------------------------------------------------------
# Order and shards.


@pytest.mark.parametrize(
    "world, micro_batch, accumulation", [(1, 1, 1), (1, 4, 2), (2, 3, 1), (4, 2, 3)]
)
def test_shards_are_disjoint_and_make_up_the_global_batch(world, micro_batch, accumulation):
    size = world * micro_batch * accumulation
    for step in (0, 5):
        shards = [
            list(pair_numbers(step, micro, rank, world, micro_batch, accumulation))
            for micro in range(accumulation)
            for rank in range(world)
        ]
        assert all(len(shard) == micro_batch for shard in shards)
        assert sorted(sum(shards, [])) == list(range(step * size, (step + 1) * size))


def test_a_rank_beyond_the_world_is_refused():
    for rank, micro in ((2, 0), (0, 3), (-1, 0)):
        with pytest.raises(ValueError, match="rank"):
            pair_numbers(0, micro, rank, world=2, micro_batch=1, accumulation=3)


def test_each_row_is_seen_once_an_epoch_in_an_order_of_its_own():
    dataset = dataset_of(columns())
    pairs, other = Pairs(dataset, SIZE, seed=0), Pairs(dataset, SIZE, seed=1)
    epochs = [[pairs.order.row(e * ROWS + i) for i in range(ROWS)] for e in range(3)]
    epochs.append([other.order.row(i) for i in range(ROWS)])
    assert all(sorted(order) == list(range(ROWS)) for order in epochs)
    assert len({tuple(order) for order in epochs} | {tuple(range(ROWS))}) == 5


def by_number(batches):
    """{n: (winner, loser, caption)} of batches."""
    items = {}
    for batch in batches:
        winners, losers = batch["pixels"].chunk(2)
        for n, *item in zip(batch["n"].tolist(), winners, losers, batch["captions"], strict=True):
            assert n not in items
            items[n] = item
    return items


def noisy(n=ROWS):
    """Pictures of noise, 28 x 20, so that flip and crop can be told; rows as in `columns`."""
    rng, table = np.random.default_rng(0), columns(n)
    for name in ("jpg_0", "jpg_1"):
        pixels = rng.integers(0, 256, (n, 20, 28, 3), dtype=np.uint8)
        table[name] = [encode(Image.fromarray(p)) for p in pixels]
    return table


def test_pair_n_is_the_same_for_every_split_of_the_work(tmp_path):
    dataset = read_pairs(source_of("file", tmp_path, noisy()))
    pairs = lambda: Pairs(dataset, SIZE, 3, crop="random", caption_dropout=0.5)  # noqa: E731
    whole = by_number(loader(pairs(), 0, 4, 0, 1, 8, 1))
    parts = [loader(pairs(), 0, 4, rank, 2, 2, 2) for rank in (0, 1)]
    split = by_number(batch for part in parts for batch in part)
    assert sorted(whole) == sorted(split) == list(range(32))  # across the ends of three epochs
    backwards = pairs()
    for n in reversed(range(32)):
        item, (winner, loser, caption) = backwards[n], whole[n]
        assert item["winner"].equal(winner) and item["loser"].equal(loser)
        assert item["caption"] == caption == split[n][2]
        assert split[n][0].equal(winner) and split[n][1].equal(loser)


def test_a_later_start_gives_what_would_have_come_then():
    pairs = Pairs(dataset_of(columns()), SIZE, seed=0)
    whole = [batch["n"].tolist() for batch in loader(pairs, 0, 5, 1, 2, 3, 2)]
    assert len(whole) == 10
    assert [batch["n"].tolist() for batch in loader(pairs, 3, 5, 1, 2, 3, 2)] == whole[6:]
    for i, numbers in enumerate(whole):
        assert numbers == list(pair_numbers(i // 2, i % 2, 1, 2, 3, 2))


def test_loading_leaves_the_random_state_of_training_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(Pairs(dataset_of(columns()), SIZE, seed=0), 0, 1, 0, 1, 2, 1))
    assert torch.get_rng_state().equal(before)


def test_workers_are_spawned_so_that_they_hold_no_locks_and_end_with_their_trainer():
    batches = loader(Pairs(dataset_of(columns()), SIZE, seed=0), 0, 1, 0, 1, 2, 1, workers=1)
    assert batches.multiprocessing_context.get_start_method() == "spawn"


def test_workers_read_what_the_trainer_would_and_what_they_are_given_fits_into_a_pipe(monkeypatch):
    """A trainer writes it at one go, and so does not wait for the worker's imports."""
    dump, sizes = multiprocessing.reduction.dump, []

    def measured(thing, file, protocol=None):
        dump(thing, file, protocol)
        sizes.append(file.tell())

    monkeypatch.setattr(multiprocessing.reduction, "dump", measured)
    dataset = dataset_of(noisy()).select(np.arange(100_000)[::-1] % ROWS)
    pairs = Pairs(dataset, SIZE, seed=3, crop="random", caption_dropout=0.5)
    one, two = (list(loader(pairs, 0, 1, 0, 1, 8, 2, workers)) for workers in (0, 2))
    assert len(sizes) == 4 and max(sizes) < 2**16
    for ours, theirs in zip(one, two, strict=True):
        assert ours["pixels"].equal(theirs["pixels"]) and ours["row"].equal(theirs["row"])
        assert ours["captions"] == theirs["captions"]


TRAINER = """
import io, signal, sys
from PIL import Image, ImageFile, TiffImagePlugin
import data

with open("imports", "a") as file:
    print(__name__, file=file)

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # what a trainer does with them is not data's
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    png = buffer.getvalue()
    row = {"jpg_0": png, "jpg_1": png + bytes(1), "label_0": 1.0, "caption": ""}
    batches = iter(data.loader(data.Pairs([row], 8, 0), 0, 50, 0, 1, 1, 1, workers=1))
    print(batches._workers[0].pid, flush=True)
    sys.stdin.readline()
    next(batches)
    print("started", flush=True)
    sys.stdin.readline()
    print(1 + len(list(batches)), flush=True)
"""


@pytest.fixture
def trainer(request, tmp_path):
    """(process, pid of its worker, which just starts), in a session of its own, waiting for a line
    to use it, and for another to go on."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    process = subprocess.Popen(
        [sys.executable, getattr(request, "param", "trainer.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        yield process, int(process.stdout.readline())
        process.kill()
    assert (tmp_path / "imports").read_text() == "__main__\n"  # the worker did not import it


def go_on(process):
    process.stdin.write("go on\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def ended(pid, seconds):
    """Whether it ends in that time (a zombie that nobody waits for has ended)."""
    for _ in range(int(10 * seconds)):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True).stdout
        if state.strip()[:1] in (b"", b"Z"):
            return True
        time.sleep(0.1)
    return False


def test_a_worker_survives_the_signals_that_stop_a_run_and_ends_with_the_loader(trainer):
    process, worker = trainer
    for said in ("started", "50"):  # it survives while it starts, and later
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.killpg(process.pid, number)
            assert not ended(worker, 0.5)
        assert go_on(process) == said
    assert process.wait(60) == 0 and ended(worker, 5)


@pytest.mark.parametrize(
    "trainer, started", [("trainer.py", False), ("-mtrainer", True)], indirect=["trainer"]
)
def test_a_worker_ends_with_a_trainer_that_was_killed(trainer, started):
    process, worker = trainer
    if started:
        assert go_on(process) == "started" and not ended(worker, 0.5)
    process.kill()
    assert ended(worker, 30)  # it looks for the trainer every 5 s


# --------------------------------------------------------------------------------------------------
# Augmentation and preprocessing.


def test_flip_dropout_and_crop_have_their_rates_and_are_independent():
    pairs = Pairs(dataset_of(columns()), SIZE, seed=0, crop="random", caption_dropout=0.2)
    crops, flips, drops = zip(*(pairs.augmentation(n) for n in range(4000)), strict=True)
    x = np.column_stack([np.array(crops), flips, drops]).astype(float)
    assert np.abs(x.mean(0) - (0.5, 0.5, 0.5, 0.2)).max() < 0.03
    assert np.abs(np.corrcoef(x.T) - np.eye(4)).max() < 0.06
    assert x[:, :2].min() >= 0 and x[:, :2].max() < 1
    again = [Pairs(pairs.dataset, SIZE, seed=1, crop="random").augmentation(n)[0] for n in range(9)]
    assert len(set(again) | set(crops)) == 4009  # another seed, other draws


def test_augmentation_can_be_turned_off():
    pairs = Pairs(dataset_of(columns()), SIZE, seed=0, crop="center", flip=False, caption_dropout=0)
    assert {pairs.augmentation(n) for n in range(200)} == {(None, False, False)}
    with pytest.raises(ValueError, match="center"):
        Pairs(pairs.dataset, SIZE, seed=0, crop="centre")


def test_winner_and_loser_share_flip_crop_and_caption():
    table = noisy()
    # The same picture twice (in other bytes): what differs, the augmentation did.
    table["jpg_1"] = [data + b"\0" for data in table["jpg_0"]]
    pairs = Pairs(dataset_of(table), SIZE, seed=0, crop="random", caption_dropout=0.5)
    items = [pairs[n] for n in range(24)]
    assert all(item["winner"].equal(item["loser"]) for item in items)
    assert {item["caption"] == "" for item in items} == {True, False}
    by_row = {row: [i["winner"] for i in items if i["row"] == row] for row in range(ROWS)}
    assert sum(not one.equal(two) for one, two in by_row.values()) > ROWS // 2  # and it does differ


def test_an_image_of_the_resolution_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    for crop_at in (None, (0.9, 0.1)):
        out = preprocess(Image.fromarray(pixels), SIZE, crop_at, flip=False)
        assert out.dtype == torch.uint8 and out.is_contiguous()
        assert (out.permute(1, 2, 0).numpy() == pixels).all()
    assert preprocess(Image.fromarray(pixels), SIZE, None, flip=True).equal(out.flip(2))
    assert preprocess(Image.new("RGB", (8, 8)), 8, None, False).eq(0).all()
    assert preprocess(Image.new("RGB", (8, 8), "white"), 8, None, False).eq(255).all()


@pytest.mark.parametrize("height, width", [(16, 30), (40, 16), (16, 17)])
def test_crop_takes_the_centre_or_the_place_that_is_asked(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1)
    top, left = (height - 16) // 2, (width - 16) // 2
    image = Image.fromarray(pixels)
    center = preprocess(image, 16, None, False)
    assert center.equal(expected[:, top : top + 16, left : left + 16])
    assert preprocess(image, 16, (0.0, 0.0), False).equal(expected[:, :16, :16])
    assert preprocess(image, 16, (0.9999, 0.9999), False).equal(expected[:, -16:, -16:])
    down, across = (0.0, 0.9999) if width > 16 else (0.9999, 0.0)
    assert preprocess(image, 16, (across, down), False).equal(expected[:, -16:, -16:])


@pytest.mark.parametrize("size", [(80, 40), (20, 10), (41, 23), (16, 61)])
def test_resize_keeps_the_aspect_and_the_middle(size):
    """Left half black, right half white, any size: a centre crop still turns in its middle."""
    width, height = size
    turned = width < height
    pixels = np.zeros((min(size), max(size), 3), dtype=np.uint8)
    pixels[:, max(size) // 2 :] = 255
    image = Image.fromarray(pixels.swapaxes(0, 1) if turned else pixels)
    out = preprocess(image, 16, None, False).int()  # of uint8 no difference is negative
    out = out.swapaxes(1, 2) if turned else out
    assert out.shape == (3, 16, 16)
    assert out[:, :, :5].eq(0).all() and out[:, :, 11:].eq(255).all()
    assert out.diff(dim=2).ge(0).all() and out.diff(dim=1).eq(0).all()


def test_shrinking_averages_instead_of_skipping_pixels():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert (preprocess(Image.fromarray(stripes), 16, None, False).float() - 127.5).abs().max() < 13


def test_modes_and_orientation_become_upright_rgb():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 51))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    for image, color in (
        (clear, (255, 255, 255)),
        (half, (204, 204, 204)),
        (Image.new("LA", (8, 8), (0, 0)), (255, 255, 255)),
        (Image.new("L", (8, 8), 77), (77, 77, 77)),
        (palette, (10, 200, 30)),
    ):
        out = data.decode(encode(image))
        assert out.mode == "RGB" and out.getcolors() == [(64, color)]
    bars = Image.new("RGB", (8, 4))
    bars.paste((255, 255, 255), (0, 0, 8, 2))  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    upright = np.asarray(data.decode(encode(bars, exif=exif)))
    assert upright[0, 0, 0] == 0 and upright[3, 0, 0] == 255


def tiff(values, **tags):
    """A TIFF of these values; tags by number, as t262."""
    named = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        named[int(name[1:])] = value
    return encode(Image.fromarray(values), "TIFF", tiffinfo=named)


def tiff_of_12_bits(*values):
    """Two values, which PIL can read, but not write."""
    numbers = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 200), (277, 1), (279, 3)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in numbers)
    head = b"II*\0" + struct.pack("<IH", 8, len(numbers)) + entries + bytes(4)
    a, b = values
    return head.ljust(200, b"\0") + bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])


GREY16 = np.array([[0, 128, 129, 25700], [32896, 65278, 65406, 65535]], dtype=np.uint16)
GREY8 = [[0, 0, 1, 100], [128, 254, 254, 255]]  # v / 257
FLOATS = (GREY16 / 65535).astype(np.float32)
WIDE = np.array([[0, 300, 257 * 9, 65535]], dtype=np.uint16)
DEEP = {
    "png": (encode(Image.fromarray(GREY16)), GREY8),
    "png, 300 is clear": (encode(Image.fromarray(WIDE), transparency=300), [[0, 255, 9, 255]]),
    "tiff": (tiff(GREY16), GREY8),
    "tiff, big-endian": (tiff(GREY16.astype(">u2")), GREY8),
    "tiff, white is 0": (tiff(GREY16, t262=0), [[255 - v for v in row] for row in GREY8]),
    "tiff, 12 bits": (tiff_of_12_bits(4095, 1606), [[255, 100]]),
    "tiff of floats": (tiff(FLOATS), GREY8),
    "jpeg 2000": (encode(Image.fromarray(GREY16), "JPEG2000"), GREY8),
    "pgm": (b"P5 4 2 65535\n" + GREY16.astype(">u2").tobytes(), GREY8),
    "pgm, 10 bits": (b"P2 2 1 1023\n1023 512", [[255, 128]]),
    "pfm": (b"Pf 4 2 -1.0\n" + FLOATS[::-1].astype("<f4").tobytes(), GREY8),
}


@pytest.mark.parametrize("kind", DEEP)
def test_grey_of_more_than_8_bits_is_scaled_by_its_type(kind):
    encoded, expected = DEEP[kind]
    out = data.decode(encoded)
    assert out.mode == "RGB"
    assert np.asarray(out).tolist() == [[[v] * 3 for v in row] for row in expected]


def test_deep_grey_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    for values, form in ((GREY16, "PNG"), (GREY16, "TIFF"), (FLOATS, "TIFF")):
        out = data.decode(encode(Image.fromarray(values), form, exif=exif))
        assert np.asarray(out)[..., 0].tolist() == np.rot90(GREY8, -1).tolist()


@pytest.mark.parametrize(
    "values, words",
    [
        (FLOATS * 255, "TIFF of floats has values outside 0..1"),
        (FLOATS - 0.5, "outside 0..1"),
        (FLOATS * np.nan, "outside 0..1"),
        (GREY16.astype(np.int32), "TIFF of integers with a sign or of 32 bits has no white"),
    ],
)
def test_grey_whose_type_does_not_tell_its_white_is_broken(values, words):
    table = columns()
    table["jpg_0"][0] = tiff(values)
    with pytest.raises(ValueError, match=words):
        data.decode(table["jpg_0"][0])
    pairs = Pairs(dataset_of(table), SIZE, seed=0)
    assert 0 not in {pairs[n]["row"] for n in range(ROWS)}


def test_an_empty_caption_is_trained_on_and_a_missing_one_is_broken():
    rows = dataset_of(columns(2) | {"caption": [None, ""]})
    pairs = Pairs(rows, SIZE, seed=0, caption_dropout=0)
    for item in (pairs[0], pairs[1]):
        assert (item["caption"], item["row"]) == ("", 1)
        assert {broken["reason"] for broken in item["broken"]} <= {"it has no caption"}


def test_a_picture_beside_itself_is_broken():
    table = columns(2)
    table["jpg_1"][0] = table["jpg_0"][0]
    pairs = Pairs(dataset_of(table), SIZE, seed=0)
    broken = [*pairs[0]["broken"], *pairs[1]["broken"]]
    assert {one["row"] for one in broken} == {0}
    assert {one["reason"] for one in broken} == {"both pictures are the same"}


def test_winner_and_loser_may_differ_in_size():
    table = columns(1)
    table["jpg_1"] = [solid(0, 0, 255, size=(40, 24))]
    item = Pairs(dataset_of(table), SIZE, seed=0)[0]
    assert item["winner"].shape == item["loser"].shape == (3, SIZE, SIZE)


# --------------------------------------------------------------------------------------------------
# Broken images.


def claims(width, height):
    """A small PNG that claims so many pixels."""
    good = solid(0, 0, 0)
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return good[:12] + header + struct.pack(">I", zlib.crc32(header)) + good[33:]


@pytest.mark.parametrize("height", [8193, 16384, 30000])  # PIL is silent, warns, raises
def test_a_picture_of_too_many_pixels_is_refused_before_it_takes_memory(height, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # where the memory is taken
    with warnings.catch_warnings(action="error"), pytest.raises(Exception, match="pixels"):
        data.decode(claims(8192, height))


def test_a_picture_that_is_too_long_to_be_resized_drops_its_pair(monkeypatch):
    """1 x 5000 at 1024 px would be 1024 x 5120000: 21 GB. 1 : 64 is the most."""
    resized, resize = [], Image.Image.resize

    def noted(image, size, *rest):
        assert size[0] * size[1] <= 8192 * 8192
        resized.append(size)
        return resize(image, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", noted)
    for size in ((1, 5000), (5000, 1), (16, 1025)):
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels is too long for 1024"):
            preprocess(Image.new("RGB", size), 1024, None, False)
    assert not resized
    monkeypatch.setattr(data, "PIXELS", 64 * SIZE * SIZE)
    table = columns(labels=(1.0,))
    table["jpg_1"][3] = solid(0, 0, 0, size=(1, 65))
    table["jpg_1"][4] = solid(4, 0, 255, size=(1, 64))
    pairs = Pairs(dataset_of(table), SIZE, seed=0)
    assert {pairs[n]["row"] for n in range(ROWS)} == set(range(ROWS)) - {3}
    assert max(w * h for w, h in resized) == 64 * SIZE * SIZE


def test_whatever_resizing_raises_drops_the_pair(monkeypatch):
    def no_memory(image, *_):
        if image.size == (40, 24):
            raise MemoryError
        return resize(image, *_)

    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", no_memory)
    table = columns()
    table["jpg_1"][3] = solid(0, 0, 0, size=(40, 24))
    pairs = Pairs(dataset_of(table), SIZE, seed=0)
    assert 3 not in {pairs[n]["row"] for n in range(ROWS)}


@pytest.mark.parametrize("kind", ["file", "arrow image"])
def test_a_broken_image_drops_its_pair_and_all_others_still_match(kind, tmp_path):
    table = columns(labels=(1.0, 0.0))
    table["jpg_0"][2] = b"no image"
    table["jpg_1"][5] = table["jpg_1"][5][:60]  # cut off
    table["jpg_0"][7] = None
    table["jpg_1"][8] = b""
    table["jpg_0"][9] = claims(20000, 20000)
    pairs = Pairs(read_pairs(source_of(kind, tmp_path, table)), SIZE, seed=0, caption_dropout=0)
    items = [pairs[n] for n in range(ROWS)]
    assert {item["row"] for item in items} == set(range(ROWS)) - {2, 5, 7, 8, 9}
    for n, item in enumerate(items):
        tried = [*itertools.islice(pairs.order.tries(n), len(item["broken"]) + 1)]
        assert tried == [*(b["row"] for b in item["broken"]), item["row"]]
        assert item["n"] == n and tried[0] == pairs.order.row(n)
        assert item["caption"] == f"row {item['row']}"
        assert levels(item["winner"][None]).tolist() == [[item["row"], 255, 0]]
        assert levels(item["loser"][None]).tolist() == [[item["row"], 0, 255]]
    batch = collate(items)
    assert batch["broken"] == sum((item["broken"] for item in items), [])
    assert len({broken["n"] for broken in batch["broken"]}) == 5  # pairs whose own row is broken
    assert len(batch["captions"]) == ROWS and len(batch["pixels"]) == 2 * ROWS


def test_broken_images_without_end_are_an_error_of_one_sentence_even_in_a_worker():
    table = {**columns(), "jpg_1": [b"no image"] * ROWS}
    pairs = Pairs(dataset_of(table), SIZE, seed=0)
    messages = []
    for workers in (0, 1):
        with pytest.raises(UserError) as caught:
            list(loader(pairs, 0, 1, 0, 1, 1, 1, workers))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith("100 pairs, drawn one after the other, are broken")
    last = list(itertools.islice(pairs.order.tries(0), 100))[-1]
    assert (
        f"the last one row {last} (from 0, ties not counted): jpg_1: is no picture" in messages[0]
    )


def test_what_takes_the_place_of_broken_pairs_is_fair():
    """Of 64 rows a quarter is broken. In each epoch the k-th tries are all rows, each once; in 50
    epochs the other rows are seen as often as each other, up to chance. (With the next row in
    order, the variance of their counts would be 0.44 an epoch.)"""
    table, tiny = columns(64), solid(0, 0, 0, size=(1, 1))
    table |= {
        "jpg_0": [tiny] * 4 + [b""] * 16 + [tiny] * 44,
        "jpg_1": [solid(9, 9, 9, size=(1, 1))] * 64,
    }
    pairs = Pairs(list(dataset_of(table)), 1, seed=0)
    for epoch in (range(64), range(192, 256)):
        tries = [list(itertools.islice(pairs.order.tries(n), 4)) for n in epoch]
        assert all(sorted(rows) == list(range(64)) for rows in zip(*tries, strict=True))
    seen = np.bincount([pairs[n]["row"] for n in range(64 * 50)], minlength=64)
    assert seen[4:20].sum() == 0 and seen.sum() == 64 * 50
    assert np.delete(seen, slice(4, 20)).var() / 50 < 0.33


def test_broken_pairs_are_named_by_file_row_and_reason(tmp_path):
    table = columns()  # ties: rows 2 and 8
    table["jpg_0"][3], table["jpg_1"][9] = b"no image", tiff(FLOATS * 255)
    half = {name: values[:6] for name, values in table.items()}
    parquet(tmp_path / "a.parquet", half)
    parquet(tmp_path / "b.parquet", {name: values[6:] for name, values in table.items()})
    pairs = Pairs(read_pairs(str(tmp_path)), SIZE, seed=0)
    (batch,) = loader(pairs, 0, 1, 0, 1, len(pairs), 1, workers=1)
    found = {(b["row"], Path(b["file"]).name, b["file_row"], b["reason"]) for b in batch["broken"]}
    assert found == {
        (2, "a.parquet", 3, f"jpg_0: is no picture that can be read ({', '.join(FORMATS)})"),
        (7, "b.parquet", 3, "jpg_1: a TIFF of floats has values outside 0..1"),
    }
    saved = read_pairs(source_of("arrow", tmp_path / "saved"))
    assert saved.origin(9) == (str(tmp_path / "saved" / "saved"), 11)


def invalid_captions(folder):
    """Pairs of which row 3 has a caption that is no UTF-8, as parquet holds without a check."""
    table = pa.table(columns())
    bad = [f"row {i}".encode() if i != 3 else b"caf\xe9" for i in range(ROWS)]
    return parquet(
        folder / "p.parquet", table.set_column(3, "caption", pa.array(bad).view("string"))
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cell_that_cannot_be_read_drops_its_pair(workers, tmp_path):
    rows = read_pairs(invalid_captions(tmp_path))
    assert len(data.fingerprint(rows)) == 16
    pairs = Pairs(rows, SIZE, seed=0)
    (batch,) = loader(pairs, 0, 1, 0, 1, len(pairs), 1, workers)
    assert 2 not in batch["row"].tolist()
    assert {b["reason"] for b in batch["broken"]} == {"the caption is no UTF-8"}


# --------------------------------------------------------------------------------------------------
# A sample, for the dry run.


@pytest.mark.parametrize("labels_only", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "image file", "arrow"])
def test_a_sample_decodes_pairs_and_tells_what_is_wrong(kind, labels_only, tmp_path):
    table = columns()
    table["jpg_1"][4] = b"no image"
    source = source_of(kind, tmp_path, table)
    captions, broken = data.sample(read_pairs(source, labels_only=labels_only), SIZE)
    assert len(captions) == ROWS - 3 and len(broken) == 1
    assert set(captions) < set(table["caption"])
    assert broken[0].startswith("row 4 (from 0) of ") and ": jpg_1: is no picture" in broken[0]
    assert copies() == [] or not labels_only


def test_a_sample_is_spread_over_files_and_row_groups_and_leaves_out_ties(tmp_path):
    for k in range(20):
        parquet(tmp_path / f"{k:02}.parquet", columns(60, first=k), rows=20)
    rows = read_pairs(str(tmp_path), labels_only=True)
    labels = {str(file): pq.read_table(file)["label_0"].to_pylist() for file in tmp_path.iterdir()}
    drawn = [(*place, read()) for place, read in rows.some(64, seed=0)]
    assert len(drawn) == len({(file, row) for file, row, _ in drawn}) == 64
    assert len({(file, row // 20) for file, row, _ in drawn}) == 8
    for file, row, pair in drawn:
        assert pair["caption"] == f"row {int(Path(file).stem) + row}"
        assert pair["label_0"] == labels[file][row] != 0.5
    assert [place for place, _ in rows.some(64, seed=0)] == [drawn_[:2] for drawn_ in drawn]
