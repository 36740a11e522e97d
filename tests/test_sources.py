"""Readers of pairs: from every kind of source, each picture meets its own caption and label.

Row i of these data has red level i; its winner is green, its loser blue. Solid pictures, so that
any pixel tells row and role."""

import csv
import io
import json
import tarfile
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data
import train_inpo
from sources.columns import SCHEMAS, asked, recognise
from system.files import UserError

SIZE = 8
LABELS = (1.0, 0.0, 0.5, 0.0, 1.0, 1.0)
ROWS = 12
DECIDED = [i for i in range(ROWS) if LABELS[i % 6] != 0.5]


def solid(red, green, blue):
    Image.new("RGB", (SIZE, SIZE), (red, green, blue)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def row(i):
    """(label, first picture, second picture, caption)."""
    label = LABELS[i % 6]
    first, second = solid(i, 255, 0), solid(i, 0, 255)  # winner, loser
    return label, *((second, first) if label == 0 else (first, second)), f"row {i}, and more"


def kept(folder, name, picture):
    """The path of a picture, written to folder/images, relative to the folder."""
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / name).write_bytes(picture)
    return f"images/{name}"


def check(source, rows=DECIDED, **options):
    """By pixels: the pairs of a source are these rows, each with its own caption."""
    pairs = data.Pairs(data.read_pairs(str(source), **options), SIZE, seed=0, caption_dropout=0)
    items = [pairs[n] for n in range(len(pairs))]
    seen = sorted(int(item["caption"].split()[1].rstrip(",")) for item in items)
    assert seen == sorted(rows) and not any(item["broken"] for item in items)
    for item in items:
        i = int(item["caption"].split()[1].rstrip(","))
        assert item["caption"] == f"row {i}, and more"
        assert item["winner"].unique(dim=1).unique(dim=2).flatten().tolist() == [i, 255, 0]
        assert item["loser"].unique(dim=1).unique(dim=2).flatten().tolist() == [i, 0, 255]
    return pairs


# --------------------------------------------------------------------------------------------------
# Tables of paths.


def table(folder, label=lambda label: label, names=("a", "b", "choice", "text")):
    rows = []
    for i in range(ROWS):
        said, first, second, caption = row(i)
        paths = kept(folder, f"{i}-0.png", first), kept(folder, f"{i}-1.png", second)
        rows.append(dict(zip(names, (*paths, label(said), caption), strict=True)))
    return rows


def write_csv(file, rows, delimiter=",", encoding="utf-8"):
    with open(file, "w", newline="", encoding=encoding) as opened:
        writer = csv.DictWriter(opened, [*rows[0]], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_json(file, rows):
    one = "\n".join(map(json.dumps, rows)) if file.suffix == ".jsonl" else json.dumps(rows)
    file.write_text(one)
    return file


ASKED = ["image_0=a", "image_1=b", "label_0=choice", "caption=text"]
PICKAPIC = ("jpg_0", "jpg_1", "label_0", "caption")


@pytest.mark.parametrize("kind", ["a.csv", "a.tsv", "a.jsonl", "a.json", "; a.csv", "utf-16 a.csv"])
def test_a_table_of_paths_gives_its_pairs(kind, tmp_path):
    options, name = ([], *kind.split())[-2:] if " " in kind else ("", kind)
    file = tmp_path / name
    if file.suffix in (".csv", ".tsv"):
        options = {";": {"delimiter": ";"}, "utf-16": {"encoding": "utf-16"}}.get(options, {})
        options |= {"delimiter": "\t"} if file.suffix == ".tsv" else {}
        write_csv(file, table(tmp_path, names=PICKAPIC), **options)
    else:
        write_json(file, table(tmp_path, names=PICKAPIC))
    check(file)


@pytest.mark.parametrize("name", ["pairs.csv", "metadata.jsonl"])
def test_a_folder_with_a_table_is_read_by_it(name, tmp_path):
    file, rows = tmp_path / name, table(tmp_path, names=PICKAPIC)
    write_csv(file, rows) if name.endswith("csv") else write_json(file, rows)
    check(tmp_path)


WORDS = {
    "numbers": (lambda label: label, []),
    "booleans": (lambda label: {1.0: True, 0.0: False}.get(label, 0.5), []),
    "words": (
        lambda label: {1.0: "left", 0.0: "right"}.get(label, "same"),
        ["first=left", "second=right", "tie=same"],
    ),
    "one and two": (
        lambda label: {1.0: 1, 0.0: 2}.get(label, 0),
        ["first=1", "second=2", "tie=0"],
    ),
    "columns": (lambda label: {1.0: "a", 0.0: "b"}.get(label, "0.5"), []),
}


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("kind", WORDS)
def test_labels_are_numbers_booleans_or_words(kind, suffix, tmp_path):
    label, words = WORDS[kind]
    file, rows = tmp_path / f"a.{suffix}", table(tmp_path, label)
    write_csv(file, rows) if suffix == "csv" else write_json(file, rows)
    check(file, columns=[*ASKED, *words])


def test_absolute_paths_and_another_working_directory_make_no_difference(tmp_path, monkeypatch):
    rows = table(tmp_path, names=PICKAPIC)
    for one in rows[::2]:
        one["jpg_0"] = str(tmp_path / one["jpg_0"])
    file = write_csv(tmp_path / "a.csv", rows)
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    check(file)
    check("../a.csv")


def test_paths_as_windows_writes_them_and_suffixes_in_capitals_are_read(tmp_path):
    rows = table(tmp_path, names=PICKAPIC)
    for one in rows:
        one["jpg_1"] = one["jpg_1"].replace("/", "\\")
    check(write_csv(tmp_path / "A.CSV", rows))


# --------------------------------------------------------------------------------------------------
# Published schemas.


def schema_rows(schema, folder, as_paths):
    """Rows with the columns of a published set; pictures as bytes or paths."""
    names, found = asked(SCHEMAS[schema].split()), []
    for i in range(ROWS):
        label, first, second, caption = row(i)
        if as_paths:
            first, second = kept(folder, f"{i}-0.png", first), kept(folder, f"{i}-1.png", second)
        one = {names["caption"]: caption}
        if "winner" in names:  # these have no ties
            first, second = (second, first) if label == 0 else (first, second)
            one |= {names["winner"]: first, names["loser"]: second}
        if "label_0" in names:
            one[names["label_0"]] = label
        if "images" in names:
            said = {1.0: [1, 0], 0.0: [0, 1], 0.5: [1, 0]}[label]
            one |= {names["images"]: [first, second], names["labels"]: said}
        if "preference_0" in names:
            votes = {1.0: (0.75, 0.25), 0.0: (0.25, 0.75), 0.5: (0.5, 0.5)}[label]
            one |= {names["preference_0"]: votes[0], names["preference_1"]: votes[1]}
        if "image_0" in names:
            one |= {names["image_0"]: first, names["image_1"]: second}
        if "group" not in names:
            found.append(one | {"more": i})
            continue
        best, worst = (second, first) if label == 0 else (first, second)
        middle = kept(folder, f"{i}-m.png", solid(i, 9, 9)) if as_paths else solid(i, 9, 9)
        ranks = (1, 1, 1) if label == 0.5 else (3, 1, 2)
        for picture, rank in zip((worst, best, middle), ranks, strict=True):
            found.append(
                one | {names["image"]: picture, names["group"]: f"g{i}", names["rank"]: rank}
            )
    return found


def rows_of(schema):
    """Of schemas that know no tie, every row is a pair."""
    names = asked(SCHEMAS[schema].split())
    return range(ROWS) if "winner" in names or "images" in names else DECIDED


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("kind", ["json", "parquet", "images", "saved"])
def test_every_published_schema_gives_its_pairs(schema, kind, tmp_path):
    rows = schema_rows(schema, tmp_path, as_paths=kind == "json")
    if kind == "json":
        source = write_json(tmp_path / "a.json", rows)
    else:
        columns = {name: [one[name] for one in rows] for name in rows[0]}
        if kind == "images":
            for name, cells in columns.items():
                if isinstance(cells[0], bytes):
                    columns[name] = [{"bytes": cell, "path": None} for cell in cells]
                elif isinstance(cells[0], list) and isinstance(cells[0][0], bytes):
                    columns[name] = [[{"bytes": x, "path": None} for x in two] for two in cells]
        source = tmp_path / "a.parquet"
        pq.write_table(pa.table(columns), source)
        if kind == "saved":
            source = tmp_path / "saved"
            datasets.Dataset.from_dict(columns).save_to_disk(source)
    check(source, rows_of(schema))
    assert schema in data.read_pairs(str(source)).description
    dry = data.read_pairs(str(source), labels_only=True)
    assert len(dry) == len(rows_of(schema))
    assert data.sample(dry, SIZE)[1] == []


def test_all_pairs_of_a_group_have_the_better_rank_first(tmp_path):
    rows = schema_rows("ImageRewardDB", tmp_path, as_paths=True)
    source = write_json(tmp_path / "a.json", rows)
    pairs = data.read_pairs(str(source), columns=["pairs=all"])
    assert len(pairs) == 3 * len(DECIDED)
    rank = {one["image"]: one["rank"] for one in rows}
    file = {(tmp_path / path).read_bytes(): path for path in rank}
    for k in range(len(pairs)):
        pair = pairs[k]
        first, second = file[pair["jpg_0"]], file[pair["jpg_1"]]
        assert pair["label_0"] == 1 and rank[first] < rank[second]
        assert first.split("-")[0] == second.split("-")[0]  # of one group


def test_rows_without_a_judgement_are_left_out(tmp_path):
    rows = [one | {"has_label": i % 3 > 0} for i, one in enumerate(table(tmp_path, names=PICKAPIC))]
    for one in rows[::3]:
        one["label_0"] = None
    source = write_json(tmp_path / "a.json", rows)
    check(source, [i for i in DECIDED if i % 3])
    assert "4 have no judgement" in data.read_pairs(str(source)).description


def test_a_strength_is_the_probability_that_the_winner_wins(tmp_path):
    rows = schema_rows("Rapidata", tmp_path, as_paths=True)
    pairs = data.read_pairs(str(write_json(tmp_path / "a.json", rows)))
    assert pairs.strengths.tolist() == [0.75] * len(DECIDED) and pairs[0]["strength"] == 0.75
    rows = table(tmp_path, names=PICKAPIC)
    for i, one in enumerate(rows):
        one["strength"] = [0.25, 1.5, None][i % 3]
    pairs = data.read_pairs(str(write_json(tmp_path / "b.json", rows)))
    expected = [0.25 if i % 3 == 0 else np.nan for i in DECIDED]
    np.testing.assert_equal(pairs.strengths, expected)


# --------------------------------------------------------------------------------------------------
# Names: a folder of pictures, and tars.


def three(i, folder=""):
    """Names and contents of a pair."""
    _, first, second, caption = row(i)
    winner, loser = (second, first) if LABELS[i % 6] == 0 else (first, second)
    return {"winner.png": winner, "loser.png": loser, "txt": f"{caption}\n".encode()}


def write_folder(folder):
    for i in range(ROWS):
        place = folder / ("deep/er" if i % 2 else ".") / "x"
        place.parent.mkdir(parents=True, exist_ok=True)
        for name, content in three(i).items():
            name = f"pair {i}.txt" if name == "txt" else f"pair {i}_{name}"
            (place.parent / name).write_bytes(content)
    return folder


def write_tar(file, rows):
    with tarfile.open(file, "w") as tar:
        for i in rows:
            for name, content in sorted(three(i).items(), reverse=bool(i % 2)):
                about = tarfile.TarInfo(f"./some/{i:05}.{name}")
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    return file


def test_a_folder_of_winners_losers_and_captions(tmp_path):
    pairs = check(write_folder(tmp_path), range(ROWS))
    (tmp_path / "pair 3_loser.png").unlink(missing_ok=True)
    (tmp_path / "deep/er/pair 3_loser.png").unlink()
    (tmp_path / "pair 4.txt").unlink()
    (tmp_path / "pair 2_winner.txt").write_text("no picture")
    check(tmp_path, [i for i in range(ROWS) if i not in (3, 4)])
    assert "2 names lack one of" in data.read_pairs(str(tmp_path)).description
    assert len(pairs) == ROWS
    Image.new("RGB", (8, 8)).save(tmp_path / "pair 0_winner.webp")
    with pytest.raises(UserError, match="pair 0 has two pictures called winner"):
        data.read_pairs(str(tmp_path))


def test_tars_are_read_at_the_places_of_their_members(tmp_path):
    first = write_tar(tmp_path / "000.tar", range(5))
    check(first, range(5))
    write_tar(tmp_path / "001.tar", range(5, ROWS))
    pairs = check(tmp_path, range(ROWS))
    assert pairs.dataset.origin(7) == (str(tmp_path / "001.tar"), 2)
    write_tar(first, range(3))  # the index that was kept belongs to the old one
    check(tmp_path, [*range(3), *range(5, ROWS)])


@pytest.mark.parametrize("damage", ["cut", "header", "not"])
def test_a_damaged_tar_is_one_sentence(damage, tmp_path):
    file = write_tar(tmp_path / "a.tar", range(ROWS))
    whole = file.read_bytes()
    spoiled = {"cut": whole[:3000], "not": b"no tar" * 500}
    spoiled["header"] = whole[:4096] + b"\xff" * 512 + whole[4608:]
    file.write_bytes(spoiled[damage])
    with pytest.raises(UserError, match=r"copy it again\.$"):
        data.read_pairs(str(file))


def test_a_large_table_is_mapped_from_a_file_that_workers_share(tmp_path, monkeypatch):
    rows = data.read_pairs(str(write_csv(tmp_path / "a.csv", table(tmp_path, names=PICKAPIC))))
    assert not rows.table.cache_files
    monkeypatch.setattr("sources.mapped.SMALL", 0)
    check(tmp_path / "a.csv")
    (file,) = data.read_pairs(str(tmp_path / "a.csv")).table.cache_files
    assert file["filename"].startswith(str(datasets.config.HF_DATASETS_CACHE))


def test_the_fingerprint_is_that_of_the_pairs_whatever_their_source(tmp_path):
    paths = write_csv(tmp_path / "a.csv", table(tmp_path, names=PICKAPIC))
    cells = [row(i) for i in range(ROWS)]
    names = ("label_0", "jpg_0", "jpg_1", "caption")
    columns = {name: [cell[k] for cell in cells] for k, name in enumerate(names)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    prints = {data.fingerprint(data.read_pairs(str(f))) for f in (paths, tmp_path / "a.parquet")}
    assert len(prints) == 1


# --------------------------------------------------------------------------------------------------
# What is wrong is said in one sentence, or leaves out its pair.


def broken(pairs):
    return {one["reason"] for n in range(len(pairs)) for one in pairs[n]["broken"]}


@pytest.mark.parametrize(
    "cell, reason",
    [
        ("images/none.png", "there is no file"),
        ("https://x.org/a.png", "is a link; download the pictures first"),
        ("images", "there is no file"),
        ("", "is no picture"),
    ],
)
def test_a_picture_that_is_not_there_drops_its_pair(cell, reason, tmp_path):
    rows = table(tmp_path, names=PICKAPIC)
    rows[3]["jpg_1"] = cell
    source = write_csv(tmp_path / "a.csv", rows)
    pairs = data.Pairs(data.read_pairs(str(source)), SIZE, seed=0, caption_dropout=0)
    (said,) = broken(pairs)
    assert said.startswith("jpg_1") and reason in said
    assert all(pairs[n]["row"] != DECIDED.index(3) for n in range(30))


def test_a_row_of_another_length_never_shifts_its_cells(tmp_path):
    source = write_csv(tmp_path / "a.csv", table(tmp_path, names=PICKAPIC) * 20)
    lines = source.read_text().splitlines()
    lines[5] = lines[5].replace('"row 4, and more"', "row 4, and more")  # a comma without quotes
    source.write_text("\n".join(lines))
    rows = data.read_pairs(str(source))
    assert len(rows) == 20 * len(DECIDED) - 1
    assert f"1 have no valid label (the first is row 4 of {source})" in rows.description


CASES = {
    "unknown": ("a.csv", "x,y\n1,2\n", "has the columns x, y: they are none", "--columns"),
    "empty": ("a.csv", "", "no pair left: it has no rows"),
    "header": ("a.jsonl", "\n", "no pair left: it has no rows"),
    "json": ("a.jsonl", '{"a": 1}\n{"a":\n', "Line 2 of", "no JSON"),
    "list": ("a.jsonl", "[1]\n", "Row 0", "no JSON object"),
    "quotes": ("a.csv", 'jpg_0,jpg_1,label_0,caption\n"a,b\n', "Line 2 of", "no CSV"),
    "twice": ("a.csv", "a,a\n1,2\n", "two columns of one name"),
    "bytes": ("a.csv", b"jpg_0,caption\n\xff\xff\xff,a\n", "not UTF-8"),
    "ones and twos": (
        "a.csv",
        "jpg_0,jpg_1,label_0,caption\na,b,1,x\na,b,2,x\n",
        "Row 1",
        "label_0 2",
        "--columns first=WORD",
    ),
    "doubt": ("a.csv", "prompt,path1,path2,label\nx,a,b,0\n", "'label'", "label_0=label"),
    "ties": ("a.csv", "jpg_0,jpg_1,label_0,caption\na,b,0.5,x\n", "1 of 1 rows are ties"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_table_that_cannot_be_used_is_one_clear_sentence(case, tmp_path):
    name, content, *words = CASES[case]
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        data.read_pairs(str(tmp_path / name))
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message


def test_a_folder_of_two_kinds_asks_for_one(tmp_path):
    write_csv(tmp_path / "pairs.csv", table(tmp_path, names=PICKAPIC))
    write_tar(tmp_path / "a.tar", range(3))
    with pytest.raises(UserError, match="holds a table and tars; give one of them, as .*pairs.csv"):
        data.read_pairs(str(tmp_path))


@pytest.mark.parametrize(
    "words, said",
    [
        (["x"], "give ROLE=NAME"),
        (["winner=a", "winner=b"], "names winner twice"),
        (["pairs=some"], "must be best or all"),
        (["winner=nothing"], "no column 'nothing', it has a, b, choice, text"),
    ],
)
def test_a_wrong_columns_flag_is_one_clear_sentence(words, said, tmp_path):
    source = write_csv(tmp_path / "a.csv", table(tmp_path))
    with pytest.raises(UserError, match=said):
        data.read_pairs(str(source), columns=words)


def test_the_advice_for_unknown_columns_fits_when_it_is_followed(tmp_path):
    names = ("left_image", "right_image", "preferred", "prompt_en")
    source = write_csv(tmp_path / "a.csv", table(tmp_path, names=names))
    with pytest.raises(UserError) as caught:
        data.read_pairs(str(source))
    advice = str(caught.value).split("--columns ")[1].split(", or")[0]
    check(source, columns=advice.split())


def test_a_schema_may_be_changed_in_part(tmp_path):
    columns = recognise(["prompt", "chosen", "rejected", "de"], "x", asked(["caption=de"]))
    assert columns.of == {"winner": "chosen", "loser": "rejected", "caption": "de"}


# --------------------------------------------------------------------------------------------------
# The hub.


@pytest.mark.parametrize("splits", [{"train": 959_040, "test": 3}, {"test": 3}, None])
def test_a_dry_run_downloads_nothing_and_counts_as_the_page_does(splits, tmp_path, monkeypatch):
    names = {"jpg_0": "binary", "jpg_1": "binary", "label_0": "float64", "caption": "string"}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in names.items()})
    counts = splits and {k: SimpleNamespace(num_examples=n) for k, n in splits.items()}

    def download():
        raise AssertionError("it was downloaded")

    builder = SimpleNamespace(
        info=SimpleNamespace(features=features, splits=counts),
        cache_dir=str(tmp_path / "none"),
        download_and_prepare=download,
        as_dataset=download,
    )
    monkeypatch.setattr(data, "check_pairs", lambda source: None)
    monkeypatch.setattr("sources.saved.reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)
    if not splits or "train" not in splits:
        said = "does not say how many pairs" if not splits else "no split 'train', it has test"
        with pytest.raises(UserError, match=said):
            data.read_pairs("owner/pairs", labels_only=True)
        return
    rows = data.read_pairs("owner/pairs", labels_only=True)
    assert len(rows) == 959_040 and data.sample(rows, SIZE) == ([], [])
    assert "not downloaded yet" in rows.description and len(data.fingerprint(rows)) == 16


# --------------------------------------------------------------------------------------------------
# Training takes them.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv folder", "jsonl", "folder", "tars", *SCHEMAS])
def test_a_step_is_trained_on_the_pairs_of_the_source(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (place := tmp_path / "mine").mkdir()
    rows = range(ROWS)
    if kind == "csv folder":
        write_csv(place / "pairs.csv", table(place, names=PICKAPIC))
        rows = DECIDED
    elif kind == "jsonl":
        write_json(place / "pairs.jsonl", table(place, names=PICKAPIC))
        rows = DECIDED
    elif kind == "folder":
        write_folder(place)
    elif kind == "tars":
        write_tar(place / "a.tar", range(ROWS))
    else:
        lines = schema_rows(kind, place, as_paths=False)
        columns = {name: [one[name] for one in lines] for name in lines[0]}
        place = place / "saved"
        datasets.Dataset.from_dict(columns).save_to_disk(place)
        rows = rows_of(kind)
    seen = []

    def recorded(*options):
        for batch in loader(*options):
            seen.append(batch)
            yield batch

    loader = data.loader
    monkeypatch.setattr(data, "loader", recorded)
    count = len(rows)
    train_inpo.main(
        ["--model=tiny", f"--data={place}", "--out=run", "--steps=1", f"--batch={count}"]
        + [f"--micro-batch={count}", "--sample-every=0", "--inversion-steps=2", "--no-flip"]
        + ["--caption-dropout=0", "--warmup=0", "--workers=0"]
    )
    (batch,) = seen
    numbers = [int(caption.split()[1].rstrip(",")) for caption in batch["captions"]]
    assert sorted(numbers) == sorted(rows)
    levels = batch["pixels"].float().mean((2, 3)).round().int()
    assert levels.tolist() == [
        [i, *side] for side in ([255, 0], [0, 255]) for i in numbers
    ]  # winners are green, losers blue
    assert (tmp_path / "run" / "unet").is_dir()
