"""Laws of order.py and buckets.py, of what data.py does with them, and of runs with --buckets and
--true-sizes. Row i of these data is wide, square or high, by i mod 3; its pictures are noise."""

import itertools
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import distance, metrics, refuse, untimed, weights
from launch import launch
from PIL import Image
from test_data import by_number, encode

import data
import model
import train_inpo
from data import Pairs, loader
from sources import buckets
from sources.order import OWN_TRIES, Bucketed
from training import budget, folder
from weights import loading

SHAPES = [(12, 20), (16, 16), (20, 12)]
SIZES = [(24, 40), (32, 32), (40, 24)]  # (height, width) of pictures
ROWS = 24


def noisy(rows=ROWS, sizes=SIZES) -> dict[str, list]:
    rng, table = np.random.default_rng(0), {"jpg_0": [], "jpg_1": [], "label_0": [], "caption": []}
    for i in range(rows):
        for name in ("jpg_0", "jpg_1"):
            pixels = rng.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8)
            table[name].append(encode(Image.fromarray(pixels)))
        table["label_0"].append(float(i % 2))
        table["caption"].append(f"a {('red', 'blue')[i % 2]} circle")
    return table


def rows_of(table: dict) -> data.Rows:
    """In a file of its own, beside the cache of the test."""
    folder = datasets.config.HF_DATASETS_CACHE
    file = folder / f"{len(list(folder.glob('*.parquet')))}.parquet"
    pq.write_table(pa.table(table), file)
    return data.read_pairs(str(file))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def rows(cache) -> data.Rows:
    return rows_of(noisy())


# --------------------------------------------------------------------------------------------------
# The buckets, and who is in them.

OF_SDXL = (  # 2307.01952, appendix I, height x width; and each on its side
    "512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 "
    "704x1408 704x1344 768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 "
    "1024x1024"
)


def test_the_buckets_of_sdxl_are_those_of_its_own_within_1_to_2_that_fill_the_square_most():
    own = {tuple(map(int, one.split("x"))) for one in OF_SDXL.split()}
    found = buckets.shapes(1024, 64)
    assert len(found) == 13 and set(found) <= own | {(w, h) for h, w in own}
    assert (768, 1344) in found and (704, 1472) not in found  # 1 : 2.09


@pytest.mark.parametrize("resolution, unit", [(1024, 64), (512, 64), (64, 8), (16, 4), (768, 64)])
def test_no_bucket_is_larger_than_the_square_nor_longer_than_1_to_2(resolution, unit):
    found = buckets.shapes(resolution, unit)
    assert (resolution, resolution) in found and len(found) > 2
    assert {(w, h) for h, w in found} == set(found)
    for height, width in found:
        assert height % unit == width % unit == 0 and max(height, width) <= 2 * min(height, width)
        assert 0.7 * resolution**2 < height * width <= resolution**2
        assert max(height, width) * (min(height, width) + unit) > resolution**2 or (
            min(height, width) * (max(height, width) + unit) > resolution**2
        )


def test_sides_are_multiples_of_what_vae_and_unet_shrink_by_and_of_64_where_there_is_room():
    assert buckets.unit(1024, 8, 3) == 64  # SDXL: 8 x 4 would do
    assert buckets.unit(512, 8, 4) == 64  # SD1.5: 8 x 8
    assert buckets.unit(256, 8, 3) == 32 and buckets.unit(64, 4, 2) == 8
    assert buckets.unit(16, 2, 2) == 4


def test_a_pair_goes_where_the_mean_of_its_ratios_is_nearest_whoever_won():
    shapes = buckets.shapes(1024, 64)
    pairs = {  # heights and widths of two pictures: the bucket
        ((832, 1216), (832, 1216)): (832, 1216),
        ((100, 150), (1000, 1500)): (832, 1216),  # 1 : 1.5, where buckets have 1.46 and 1.67
        ((500, 1000), (1000, 500)): (1024, 1024),
        ((500, 1000), (707, 1000)): (768, 1280),  # 1 : sqrt(2 * 1.414) = 1.68
        ((10, 1000), (10, 1000)): (704, 1408),  # longer than any
    }
    for (one, two), shape in pairs.items():
        for pair in ((one, two), (two, one)):
            (found,) = buckets.assign(np.array([pair]), shapes, 1)
            assert found == shape, pair


def test_a_bucket_that_cannot_fill_a_block_joins_the_nearest_and_none_is_lost():
    sizes = [(24, 40)] * 3 + [(32, 32)] * 9 + [(40, 24)] * 8
    sizes = np.array([(size, size) for size in sizes] + [((0, 0), (32, 32))] * 2)
    for block, wanted in (
        (1, [3, 11, 8]),
        (4, [14, 8]),  # the widest 3 are cropped to squares
        (9, [22]),
        (99, [22]),
    ):
        found = buckets.assign(sizes, SHAPES, block)
        assert [len(rows) for rows in found.values()] == wanted
        assert sorted(itertools.chain(*found.values())) == list(range(22))
    assert {*found} == {(16, 16)}
    assert {*buckets.assign(np.zeros((5, 2, 2), int), SHAPES, 1)} == {(16, 16)}  # all unreadable


def test_sizes_are_read_once_and_kept_and_read_again_where_the_file_is_damaged(rows, monkeypatch):
    read = []

    def watched(encoded):
        read.append(encoded)
        return size(encoded)

    size = buckets.upright_size
    monkeypatch.setattr(buckets, "upright_size", watched)
    for _ in range(2):
        sizes = buckets.read_sizes(rows, "key")
        assert sizes.tolist() == [[[*SIZES[i % 3]]] * 2 for i in range(ROWS)]
        assert len(read) == 2 * ROWS
    (file,) = datasets.config.HF_DATASETS_CACHE.rglob("key.npy")
    file.write_bytes(file.read_bytes()[:-1])
    assert np.array_equal(buckets.read_sizes(rows, "key"), sizes) and len(read) == 4 * ROWS
    assert len(buckets.read_sizes(rows.select(range(5)), "other")) == 5
    broken = rows_of(noisy(3) | {"jpg_0": [b"no picture", b"", noisy(3)["jpg_0"][2]]})
    assert buckets.read_sizes(broken, "broken").min((1, 2)).tolist() == [0, 0, 24]


def test_a_sample_tells_shares_and_where_there_is_none_nothing(rows):
    assert data.sampled_shapes(rows, SHAPES) == dict.fromkeys(SHAPES, 1 / 3)
    assert data.sampled_shapes(SimpleNamespace(some=lambda *_: iter(())), SHAPES) == {}


# --------------------------------------------------------------------------------------------------
# The order.


def members(*counts: int) -> dict:
    """Rows in an order of their own, so that a row and its index are told apart."""
    mixed = np.random.default_rng(1).permutation(sum(counts))
    return dict(zip(SHAPES, np.split(mixed, np.cumsum(counts)[:-1]), strict=False))


COUNTS = [(50, 30, 8), (8, 8, 8), (97, 11, 13), (5,), (200, 9, 9), (31, 8)]


@pytest.mark.parametrize("counts", COUNTS)
def test_a_block_has_one_shape_and_its_rows_are_of_it(counts):
    rows = members(*counts)
    order = Bucketed(rows, 8, seed=3)
    for block in range(60):
        numbers = range(8 * block, 8 * block + 8)
        (shape,) = {order.shape(n) for n in numbers}
        seen = [order.row(n) for n in numbers]
        assert set(seen) <= set(rows[shape].tolist())
        assert len(set(seen)) >= min(8, len(rows[shape])) / 2  # it may cross the end of a deck
    assert {order.shape(n) for n in range(480)} == set(rows)


@pytest.mark.parametrize("counts", COUNTS)
def test_all_rows_are_seen_about_equally_often_and_none_is_dropped(counts):
    rows, total = members(*counts), sum(counts)
    order = Bucketed(rows, 8, seed=0)
    epoch = 8 * -(-total // 8)
    seen = np.zeros(total, int)
    for n in range(40 * epoch):
        seen[order.row(n)] += 1
        if n % 61 == 0:
            for own in rows.values():
                assert np.ptp(seen[own]) <= 1  # within a bucket at any time
        if (n + 1) % epoch == 0:
            assert np.ptp(seen) <= 3
            assert np.abs(seen - (n + 1) / total).max() < 2
    assert seen.sum() == 40 * epoch


def test_epochs_and_seeds_have_orders_of_their_own_and_n_may_be_asked_in_any_order():
    rows = members(40, 24, 16)
    order = Bucketed(rows, 8, seed=0)
    forwards = [(order.row(n), order.shape(n)) for n in range(240)]
    assert len({tuple(shape for _, shape in forwards[i : i + 80 : 8]) for i in (0, 80, 160)}) == 3
    again = Bucketed(rows, 8, seed=0)
    backwards = [(again.row(n), again.shape(n)) for n in reversed(range(240))]
    assert backwards[::-1] == forwards
    other = Bucketed(rows, 8, seed=1)
    assert [other.shape(n) for n in range(240)] != [shape for _, shape in forwards]
    own = [row for row, shape in forwards if shape == SHAPES[0]]
    assert sorted(own[:40]) == sorted(own[40:80]) and own[:40] != own[40:80]


def test_what_takes_a_place_is_of_the_same_bucket_each_row_once_and_at_last_any():
    rows = members(40, 24, 16)
    order = Bucketed(rows, 8, seed=0)
    tries = {n: list(itertools.islice(order.tries(n), OWN_TRIES + 4)) for n in range(80)}
    for n, some in tries.items():
        assert set(some[:OWN_TRIES]) <= set(rows[order.shape(n)].tolist())
    for shape, own in rows.items():
        of_it = [some for n, some in tries.items() if order.shape(n) == shape]
        assert len(of_it) == len(own)  # an epoch that holds just all of them
        for k in range(OWN_TRIES):
            assert sorted(some[k] for some in of_it) == sorted(own)
    late = {row for some in tries.values() for row in some[OWN_TRIES:]}
    assert late == set(range(80))


# --------------------------------------------------------------------------------------------------
# Pairs and batches.


def pairs_of(rows, block=4, **options) -> Pairs:
    order = data.bucketed(rows, SHAPES, block, 3)
    options = {"crop": "random", "caption_dropout": 0.5} | options
    return Pairs(rows, 16, 3, order=order, **options)


@pytest.mark.parametrize(
    "workers", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_batches_are_the_same_for_any_ranks_and_workers_and_each_has_one_shape(rows, workers):
    pairs = pairs_of(rows)
    whole = by_number(loader(pairs, 0, 8, 0, 1, 4, 1))
    assert {tuple(winner.shape[1:]) for winner, *_ in whole.values()} == set(SHAPES)
    for world, micro_batch in ((1, 2), (2, 2), (2, 1), (4, 1)):
        shards = [
            loader(pairs, 0, 8, rank, world, micro_batch, 4 // (world * micro_batch), workers)
            for rank in range(world)
        ]
        split = by_number(batch for shard in shards for batch in shard)
        assert split.keys() == whole.keys()
        for n, (winner, loser, caption) in split.items():
            assert winner.equal(whole[n][0]) and loser.equal(whole[n][1])
            assert caption == whole[n][2] and winner.shape[1:] == pairs.order.shape(n)
        if workers:  # one split: each starts processes
            break


def test_the_buckets_of_some_rows_are_those_of_a_set_of_them_alone(rows):
    """Of what --held-out leaves: sizes are kept by the number of the row, orders count anew."""
    some = np.flatnonzero(np.arange(len(rows)) % 3)
    ours = data.bucketed(rows, SHAPES, 2, 0, some)
    alone = data.bucketed(rows.select(some), SHAPES, 2, 0)
    for n in range(3 * len(some)):
        assert ours.row(n) == alone.row(n) and ours.shape(n) == alone.shape(n)


def test_a_later_start_gives_what_would_have_come_then(rows):
    whole = [batch["pixels"] for batch in loader(pairs_of(rows), 0, 9, 1, 2, 1, 2)]
    later = [batch["pixels"] for batch in loader(pairs_of(rows), 5, 9, 1, 2, 1, 2)]
    assert len(later) == 8
    assert all(a.equal(b) for a, b in zip(whole[10:], later, strict=True))


def test_winner_and_loser_share_crop_and_flip_in_their_bucket():
    table = noisy()
    table["jpg_1"] = [encoded + b"\0" for encoded in table["jpg_0"]]  # in other bytes
    pairs = pairs_of(rows_of(table))
    items = [pairs[n] for n in range(24)]
    assert all(item["winner"].equal(item["loser"]) for item in items)


def test_a_broken_pair_is_replaced_from_its_bucket_and_a_broken_bucket_from_others():
    table = noisy()
    for row in range(0, ROWS, 3):  # all that are wide, but two
        table["jpg_0"][row] = table["jpg_0"][row][: None if row < 6 else 90]  # its header is whole
    pairs = pairs_of(rows_of(table))
    for n in range(48):
        item = pairs[n]
        assert item["winner"].shape[1:] == pairs.order.shape(n)
        assert SHAPES[item["row"] % 3] == pairs.order.shape(n)
    for row in (0, 3):
        table["jpg_0"][row] = table["jpg_0"][row][:90]
    pairs = pairs_of(rows_of(table))
    items = [pairs[n] for n in range(48)]
    wide = [item for n, item in enumerate(items) if pairs.order.shape(n) == SHAPES[0]]
    assert wide and all(item["winner"].shape[1:] == SHAPES[0] for item in wide)
    assert {item["row"] % 3 for item in wide} == {1, 2}
    assert all(len(item["broken"]) >= OWN_TRIES for item in wide)


def test_a_picture_covers_its_bucket_and_no_more():
    for image, size, resized, corner in (  # heights and widths, by hand
        ((600, 1000), (832, 1216), (832, 1386), (0, 85)),
        ((1000, 600), (832, 1216), (2026, 1216), (597, 0)),
        ((832, 1216), (832, 1216), (832, 1216), (0, 0)),
        ((900, 1000), 512, (512, 568), (0, 28)),
        ((64, 64), (12, 20), (20, 20), (4, 0)),
    ):
        assert data.placed(image, size, None) == (resized, *corner)
        height, width = (size, size) if isinstance(size, int) else size
        assert min(resized[0] - height, resized[1] - width) == 0
    assert data.placed((600, 1000), (832, 1216), (0.999, 0)) == ((832, 1386), 0, 170)
    ramp = np.zeros((24, 60, 3), np.uint8) + np.arange(60, dtype=np.uint8)[:, None] * 4
    out = data.preprocess(Image.fromarray(ramp), (12, 20), None, False)
    assert out.shape == (3, 12, 20)
    assert out.float().diff(dim=2).mean() == pytest.approx(8, rel=0.03)  # half as many, twice apart


# --------------------------------------------------------------------------------------------------
# What SDXL is told.


def test_sdxl_is_told_of_the_size_before_and_of_the_crop_after_resizing_mirrored_first():
    told = data.told
    assert told((600, 1000), (832, 1216), None, False) == [600, 1000, 0, 85, 832, 1216]
    assert told((600, 1000), (832, 1216), (0.0, 0.0), False) == [600, 1000, 0, 0, 832, 1216]
    assert told((600, 1000), (832, 1216), (0.0, 0.0), True) == [600, 1000, 0, 170, 832, 1216]
    assert told((1000, 600), (832, 1216), (0.9, 0.5), True) == [1000, 600, 597, 0, 832, 1216]
    assert told((512, 512), (1024, 1024), None, True) == [512, 512, 0, 0, 1024, 1024]


def test_the_mirrored_crop_is_at_its_left_in_the_mirrored_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8)
    out = data.preprocess(Image.fromarray(pixels), 16, (0.3, 0.0), True)
    *_, top, left, _, _ = data.told((16, 40), (16, 16), (0.3, 0.0), True)
    mirrored = torch.from_numpy(pixels[:, ::-1].copy()).permute(2, 0, 1)
    assert out.equal(mirrored[:, top : top + 16, left : left + 16]) and left == 24 - 7


def test_each_picture_of_a_pair_has_its_own_sizes_and_without_the_flag_those_of_what_is_left():
    table = noisy(1) | {"label_0": [0.0]}  # jpg_1 won
    table["jpg_1"] = [encode(Image.new("RGB", (30, 24)))]
    for flag, wanted in (
        (True, [[24, 30, 0, 2, 16, 16], [24, 40, 0, 5, 16, 16]]),
        (False, [[16, 16, 0, 0, 16, 16]] * 2),
    ):
        pairs = Pairs(rows_of(table), 16, 0, flip=False, true_sizes=flag)
        (batch,) = loader(pairs, 0, 1, 0, 1, 1, 1)
        assert batch["sizes"] == wanted


def test_sizes_reach_the_unet_in_fp32_and_sd15_is_told_nothing(checkpoint):
    pipeline = loading.load_pipeline(str(checkpoint("sdxl")), dtype=torch.bfloat16)
    cond = model.encode_prompts(pipeline, ["a red circle"], 16)
    sizes = [[1023, 777, 3, 1, 16, 16]]
    told = model.tell_sizes(cond, sizes)["added_cond_kwargs"]["time_ids"]
    assert told.dtype == torch.float32 and told.tolist() == sizes
    plain = model.tell_sizes(cond, [[16, 16, 0, 0, 16, 16]])
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    abar = model.alphas_cumprod(pipeline)
    one, two = (model.predict_noise(pipeline.unet, x, t, c, abar) for c in (cond, plain))
    assert one.equal(two)
    sd15 = {"encoder_hidden_states": torch.zeros(1)}
    assert model.tell_sizes(sd15, sizes) is sd15


# --------------------------------------------------------------------------------------------------
# Runs.


@pytest.fixture
def flags(argv, tmp_path):
    """flags(name, word, ..., flag=value, ...) -> the command of a run into a folder so named."""
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.table(noisy()), file)

    def build(name: str, *words: str, **more) -> list[str]:
        given = {"data": file, "buckets": 4, "steps": 5, "checkpoint_every": 2} | more
        return [*argv(out=tmp_path / name, **given), *words]

    return build


def test_a_run_of_all_shapes_that_was_stopped_is_bitwise_the_unbroken_one(
    flags, tmp_path, monkeypatch
):
    """SDXL, with sizes of its own; each step of 4 pairs in two micro-steps is of one shape."""
    seen, predict = [], model.predict_noise

    def watched(unet, x, t, cond, *rest):
        if x.device.type != "meta":  # where FLOPs are counted
            seen.append((tuple(x.shape[2:]), cond["added_cond_kwargs"]["time_ids"].tolist()))
        return predict(unet, x, t, cond, *rest)

    monkeypatch.setattr(model, "predict_noise", watched)
    train_inpo.main(flags("whole", "--true-sizes"))
    told = dict(seen)
    assert set(told) == {(6, 10), (8, 8), (10, 6)}  # a factor of 2
    for (h, w), sizes in told.items():
        assert sizes == [[4 * h, 4 * w, 0, 0, 2 * h, 2 * w]] * 4
    train_inpo.main(flags("stopped", "--true-sizes", steps=3))
    train_inpo.main(flags("stopped", "--true-sizes"))
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "whole")
    assert distance(weights(tmp_path / "stopped"), weights(tmp_path / "whole")) == 0


@pytest.mark.slow
def test_two_ranks_take_the_pairs_of_one_and_resume_bitwise(flags, tmp_path):
    train_inpo.main(flags("one"))
    launch(flags("two", micro_batch=1), 2)
    launch(flags("stopped", micro_batch=1, steps=3), 2)
    launch(flags("stopped", micro_batch=1), 2)
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "two")
    assert distance(weights(tmp_path / "stopped"), weights(tmp_path / "two")) == 0
    launch(flags("wider", micro_batch=1, steps=3), 2)
    train_inpo.main(flags("wider", micro_batch=2))  # on one rank
    names = "one", "two", "wider"
    losses = [[line["loss"] for line in untimed(tmp_path / name)] for name in names]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)


def test_work_is_counted_by_the_mean_of_the_shapes(checkpoint):
    config = json.loads((checkpoint() / "unet" / "config.json").read_text())
    flops = [budget.call_flops(config | {"sample_size": s}) for s in ([6, 10], [10, 6], [8, 8], 8)]
    assert flops[0] == flops[1] < flops[2] == flops[3]
    shapes = {(12, 20): 0.25, (20, 12): 0.25, (16, 16): 0.5}
    run = SimpleNamespace(shapes=shapes, factor=2, unet_config=config, tokens=77)
    assert budget.mean_call_flops(run) == pytest.approx((flops[0] + flops[2]) / 2)


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_baselines_and_sd15_take_shapes_as_well(method, flags, tmp_path, checkpoint):
    beta = None if method == "sft" else 500
    train_inpo.main(flags("run", method=method, beta=beta, model=checkpoint("sd15")))
    assert len(metrics(tmp_path / "run")) == 5


@pytest.mark.parametrize(
    "words, more, said",
    [
        (("--cache-latents",), {}, "--buckets: has no meaning with --cache-latents"),
        (("--compile",), {}, "--buckets: with --compile each (height, width)"),
        ((), {"buckets": 3}, "--buckets 3: must be a multiple of --micro-batch 2 x 1 rank(s) = 2"),
        ((), {"buckets": 3}, "give --buckets 4"),
        ((), {"buckets": -4}, "--buckets -4: must lie between 0"),
        ((), {"resolution": 18}, "--resolution 18: with --buckets it must be a multiple of 4"),
        (("--true-sizes",), {"model": "sd15"}, "is no SDXL, which alone is told of sizes"),
        (("--true-sizes", "--cache-latents"), {"buckets": 0}, "--true-sizes: has no meaning with"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(words, more, said, flags, checkpoint, capsys):
    if more.get("model") == "sd15":
        more = more | {"model": checkpoint("sd15")}
    assert said in refuse(flags("run", *words, **more), capsys)


def test_a_run_may_not_change_its_buckets_and_the_plan_tells_them(flags, tmp_path, capsys):
    train_inpo.main(flags("run", steps=2))
    said = capsys.readouterr().out
    assert "width x height: 20x12 33%, 16x16 33%, 12x20 33%; 4 pairs in a row share one" in said
    assert "buckets: 4 there, 8 now" in refuse(flags("run", buckets=8), capsys)
    assert "buckets: 4 there, 0 now" in refuse(flags("run", buckets=0), capsys)
    assert "true_sizes: False there, True now" in refuse(flags("run", "--true-sizes"), capsys)
    train_inpo.main(flags("dry", "--dry-run"))
    said = capsys.readouterr().out
    assert "of 24 sampled pairs: 20x12 33%, 16x16 33%, 12x20 33%" in said
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["buckets"] == 4
    before = {k: v for k, v in record.items() if k not in ("buckets", "true_sizes")}
    assert folder.differences(before, before | {"buckets": 0, "true_sizes": False}) == ""
    assert folder.differences(before, record) == "buckets: 0 there, 4 now"
