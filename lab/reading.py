"""How fast pairs are opened and read, beside the plain loaders of datasets and torch.

    python -m lab.reading --report docs/data.md     # a minute, two cores

Opened is a synthetic Pick-a-Pic: its columns, with pictures of 1 KB in place of 160. Read are pairs
of JPEGs of 1024 px and more, by one worker process: by ours, by datasets with a transform on a
parquet file, and by torch's Dataset on a folder. All decode, resize and crop alike, in turns.
"""

import argparse
from pathlib import Path

from system.program import Parser, reported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.reading", __doc__)
    add = parser.add_argument
    add("--pairs", type=int, default=100_000, metavar="N", help="that are opened")
    add("--repeats", type=int, default=3, metavar="N", help="of reading, by each loader")
    add("--report", type=Path, metavar="FILE", help="Markdown file, whose section is replaced")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import io
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from statistics import median

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import data
from evaluation import tables
from lab.bench import hardware, of
from system.files import ROOT, UserError, write_section

READ, SIZE, BATCH = 48, 1024, 4  # pairs that are read, pixels, pairs of a batch
GROUP = 100  # rows of a row group, as on the hub
LOADERS = "ours", "datasets", "torch"


def jpeg(rng: np.random.Generator, size: tuple[int, int], quality: int) -> bytes:
    """A picture of coarse noise, which takes about as much as a photograph."""
    coarse = rng.integers(0, 256, (size[1] // 16 or 1, size[0] // 16 or 1, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    image.save(buffer := io.BytesIO(), "JPEG", quality=quality)
    return buffer.getvalue()


def write(file: Path, pairs: int, size: tuple[int, int], different: int):
    """A parquet file in the columns of Pick-a-Pic; of pictures there are so many different ones."""
    rng = np.random.default_rng(0)
    pictures = [jpeg(rng, size, 90) for _ in range(different)]
    kinds = [("jpg_0", pa.binary()), ("jpg_1", pa.binary())]
    schema = pa.schema([*kinds, ("label_0", pa.float64()), ("caption", pa.string())])
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, pairs, GROUP):
            rows = range(start, min(start + GROUP, pairs))
            columns = {
                f"jpg_{k}": [pictures[(2 * i + k) % different] for i in rows] for k in (0, 1)
            }
            columns |= {"label_0": [float(i % 2) for i in rows]}
            columns |= {"caption": [f"caption {i}" for i in rows]}
            writer.write_table(pa.table(columns, schema))


OPEN = """
import resource, sys, time
import datasets, torch, data
datasets.disable_progress_bars()
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
rows = data.read_pairs(sys.argv[1], labels_only=sys.argv[2] == "dry")
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
start = time.perf_counter()
for row in range(0, len(rows), max(1, len(rows) // 1000)) if rows.table else ():
    rows[row]
print((time.perf_counter() - start) / 1000)
"""


def opened(file: Path, how: str) -> tuple[float, float, float]:
    """(seconds, MiB of memory, seconds a row) of opening a file in a process of its own."""
    command = [sys.executable, "-c", OPEN, str(file), how]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise UserError(f"opening {file} failed: {done.stderr.strip().splitlines()[-1]}.")
    first, each = done.stdout.splitlines()[-2:]
    seconds, kib = map(float, first.split())
    return seconds, kib / 2**10, float(each)


def square(image: Image.Image) -> torch.Tensor:
    return data.preprocess(image.convert("RGB"), SIZE, None, False)


def transformed(rows: dict) -> dict:
    """For datasets' with_transform, which has decoded the pictures."""
    return {name: [square(image) for image in rows[name]] for name in ("jpg_0", "jpg_1")}


class Folder(torch.utils.data.Dataset):
    def __init__(self, folder: Path):
        self.folder = folder

    def __len__(self) -> int:
        return READ

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        return [square(Image.open(self.folder / f"{i}-{k}.jpg")) for k in (0, 1)]


def batches(name: str, file: Path, folder: Path):
    """One worker's batches of BATCH pairs."""
    if name == "ours":
        pairs = data.Pairs(data.read_pairs(str(file)), SIZE, seed=0)
        return data.loader(pairs, 0, READ // BATCH, 0, 1, BATCH, 1, workers=1)
    rows = Folder(folder)
    if name == "datasets":
        rows = datasets.Dataset.from_parquet(str(file)).select_columns(["jpg_0", "jpg_1"])
        for column in rows.column_names:
            rows = rows.cast_column(column, datasets.Image())
        rows = rows.with_transform(transformed)
    return torch.utils.data.DataLoader(rows, BATCH, shuffle=True, num_workers=1)


def rate(name: str, file: Path, folder: Path) -> float:
    """Pairs a second, once the worker has started."""
    some = iter(batches(name, file, folder))
    next(some)
    start, count = time.perf_counter(), 0
    for _ in some:
        count += BATCH
    return count / (time.perf_counter() - start)


def measure(args: argparse.Namespace, scratch: Path) -> str:
    datasets.config.HF_DATASETS_CACHE = scratch / "cache"
    file, large, folder = scratch / "many.parquet", scratch / "large.parquet", scratch / "pictures"
    write(file, args.pairs, (64, 64), different=1000)
    opening = [
        [said, f"{seconds:.1f}", f"{memory:,.0f}", f"{1000 * each:.2f}" if each > 1e-6 else ""]
        for said, (seconds, memory, each) in (
            ("dry run", opened(file, "dry")),
            ("first, with the copy", opened(file, "run")),
            ("again", opened(file, "run")),
        )
    ]
    write(large, READ, (1536, 1152), different=2 * READ)
    folder.mkdir()
    for i, row in enumerate(pq.read_table(large).to_pylist()):
        for k in (0, 1):
            (folder / f"{i}-{k}.jpg").write_bytes(row[f"jpg_{k}"])
    rates = {name: [] for name in LOADERS}
    for _ in range(args.repeats + 1):
        for name in LOADERS:
            rates[name].append(rate(name, large, folder))
    rates = {name: values[1:] for name, values in rates.items()}  # the first one is the warm-up
    reading = [
        [name, of(values), of([a / b for a, b in zip(rates["ours"], values, strict=True)], ".2f")]
        for name, values in rates.items()
    ]
    size = median(len(row["jpg_0"]) for row in pq.read_table(large).to_pylist()) / 1e3
    heads = ["", "seconds", "MiB of memory", "ms a row, at random places"]
    return (
        f"```\n{shlex.join(['python', '-m', 'lab.reading', *sys.argv[1:]])}\n```\n\n"
        f"{date.today()}, {hardware(torch.device('cpu'))}, datasets {datasets.__version__}, torch "
        f"{torch.__version__}. A synthetic Pick-a-Pic of {args.pairs:,} pairs, "
        f"{file.stat().st_size / 1e6:,.0f} MB in row groups of {GROUP}, is opened; memory is what "
        "that adds to Python and the libraries, with the pages of mapped files:\n\n"
        f"{tables.markdown(heads, opening)}\n"
        f"{READ} pairs of JPEGs of 1536 x 1152 pixels ({size:,.0f} KB each) become squares of "
        f"{SIZE} px, in one worker process; medians of {args.repeats} turns, in parentheses the "
        "lowest and the highest:\n\n"
        f"{tables.markdown(['loader', 'pairs a second', 'times as fast is ours'], reading)}"
    )


def main(argv: list[str] | None = None):
    with reported("lab.reading"), tempfile.TemporaryDirectory(prefix="reading-") as scratch:
        args = parse(argv)
        text = measure(args, Path(scratch))
        print(text)
        if args.report:
            write_section(args.report, "Opening and reading", text)


if __name__ == "__main__":
    main()
