"""sources/streamed.py and order.Windowed: parquet files read where they lie, row groups once."""

import itertools

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import distance, png, refuse, untimed, weights

import data
import train_inpo
from sources import streamed
from sources.order import Windowed
from system.files import UserError

ROWS, GROUP, FILES = 30, 4, 3  # of a file; row groups of 4, 4, ..., 2 rows; a tenth are ties


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pairs").mkdir()
    for k in range(FILES):
        rows = range(k * ROWS, (k + 1) * ROWS)
        table = {
            "jpg_0": [png((i, 1, 1)) for i in rows],
            "jpg_1": [png((i, 9, 9)) for i in rows],
            "label_0": [0.5 if i % 10 == 7 else float(i % 2) for i in rows],
            "caption": [f"row {i}" for i in rows],
        }
        pq.write_table(pa.table(table), tmp_path / "pairs" / f"{k}.parquet", row_group_size=GROUP)
    return str(tmp_path / "pairs")


def test_rows_are_those_of_a_copy_and_nothing_is_copied(folder):
    ours = data.read_pairs(folder, stream=2)
    assert not list(datasets.config.HF_DATASETS_CACHE.rglob("*.arrow"))
    copied = data.read_pairs(folder)
    assert len(ours) == len(copied) == 81
    assert [ours[row] for row in range(81)] == [copied[row] for row in range(81)]
    assert data.fingerprint(ours) == data.fingerprint(copied)
    assert [ours.origin(row) for row in range(81)] == [copied.origin(row) for row in range(81)]


def pairs_of(folder, window=3, seed=0):
    rows = data.read_pairs(folder, stream=window)
    order = data.streamed(rows, window, seed, 8)
    return data.Pairs(rows, 8, seed, caption_dropout=0, order=order)


def test_an_epoch_is_every_row_once_and_reads_every_row_group_once(folder, monkeypatch):
    pairs, read = pairs_of(folder), []
    true = streamed.RowGroups._read

    def counted(self, group):
        read.append(group) if group not in self.tables else None
        return true(self, group)

    monkeypatch.setattr(streamed.RowGroups, "_read", counted)
    for epoch in range(2):
        read.clear()
        pairs.dataset.table.tables.clear()
        rows = [pairs[n]["row"] for n in range(81 * epoch, 81 * (epoch + 1))]
        assert sorted(rows) == list(range(81))
        assert sorted(read) == list(range(8 * FILES))
        assert len(pairs.dataset.table.tables) == 3


def test_a_window_has_rows_of_few_groups_mixed(folder):
    pairs = pairs_of(folder)
    groups = pairs.dataset.table.group_of(pairs.dataset.first)
    seen = [int(groups[pairs.order.row(n)]) for n in range(81)]
    starts = [seen.index(group) for group in dict.fromkeys(seen)]
    assert len(set(seen[:9])) == 3 and seen[:9] != sorted(seen[:9])  # mixed in a window
    for place, group in enumerate(seen):  # none comes back later
        assert place - seen.index(group) < 12
    assert len(starts) == 24


def test_orders_differ_by_epoch_and_seed_and_n_may_be_asked_in_any_order(folder):
    groups = np.repeat(np.arange(10), 5)
    order = Windowed(groups, 2, 0, (8, 8))
    forwards = [order.row(n) for n in range(150)]
    again = Windowed(groups, 2, 0, (8, 8))
    assert [again.row(n) for n in reversed(range(150))] == forwards[::-1]
    epochs = {tuple(forwards[i : i + 50]) for i in (0, 50, 100)}
    epochs.add(tuple(Windowed(groups, 2, 1, (8, 8)).row(n) for n in range(50)))
    together = {frozenset(groups[list(epoch[:10])].tolist()) for epoch in epochs}
    assert len(together) > 1 and all(len(some) == 2 for some in together)  # of the first windows
    assert len(epochs) == 4 and all(sorted(epoch) == list(range(50)) for epoch in epochs)


def test_what_takes_the_place_of_a_broken_row_is_of_its_window():
    order = Windowed(np.repeat(np.arange(10), 5), 2, 0, (8, 8))
    tries = [list(itertools.islice(order.tries(n), 4)) for n in range(50)]
    for window in range(5):
        some = tries[10 * window : 10 * (window + 1)]
        rows = sorted(one[0] for one in some)
        assert all(sorted(column) == rows for column in zip(*some, strict=True))


@pytest.mark.parametrize(
    "workers", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_batches_are_the_same_for_any_ranks_and_workers(folder, workers):
    def rows(world, micro_batch, workers):
        found = {}
        for rank in range(world):
            more = 12 // (world * micro_batch)
            for batch in data.loader(
                pairs_of(folder), 0, 8, rank, world, micro_batch, more, workers
            ):
                found |= dict(zip(batch["n"].tolist(), batch["captions"], strict=True))
        return found

    whole = rows(1, 12, 0)
    assert sorted(whole) == list(range(96))
    for world, micro_batch in ((1, 3), (2, 2), (4, 3)) if not workers else ((2, 2),):
        assert rows(world, micro_batch, workers) == whole


@pytest.mark.slow
def test_a_run_that_was_stopped_is_bitwise_the_unbroken_one(folder, argv, tmp_path, capsys):
    def train(name, **more):
        given = {"data": folder, "stream": 3, "held_out": 0.2, "checkpoint_every": 1} | more
        train_inpo.main(argv(out=tmp_path / name, steps=4, **given))

    train("whole")
    argument = argv(out=tmp_path / "stopped", steps=2, data=folder, stream=3, held_out=0.2)
    train_inpo.main(argument)
    train("stopped")
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "whole")
    assert distance(weights(tmp_path / "stopped"), weights(tmp_path / "whole")) == 0
    other = argv(out=tmp_path / "stopped", steps=5, data=folder, stream=2, held_out=0.2)
    assert "stream: 3 there, 2 now" in refuse(other, capsys)


def test_other_sources_and_buckets_are_refused(folder, argv, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("winner,loser,caption\na,b,c\n")
    with pytest.raises(UserError, match="is no folder of parquet files; leave it out"):
        data.read_pairs(str(tmp_path / "a.csv"), stream=2)
    assert "--buckets" in refuse(argv(data=folder, stream=2, buckets=4), capsys)


def test_a_file_that_is_damaged_later_drops_its_pairs_with_a_reason(folder, tmp_path):
    pairs = pairs_of(folder)
    file = tmp_path / "pairs" / "1.parquet"
    file.write_bytes(file.read_bytes()[:-8])
    reasons = {one["reason"] for n in range(81) for one in pairs[n]["broken"]}
    assert len(reasons) == 1 and "1.parquet cannot be read" in reasons.pop()
