"""Laws of cache.py: training with --cache-latents is training without it, less the encoders.

The pictures are noise, so that mirror images differ; of 12 rows one picture and one caption are
broken. 7 steps of 4 pairs are two epochs and a third."""

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import distance, refusal, refuse, untimed, weights
from launch import launch
from PIL import Image
from safetensors import safe_open
from test_data import encode

import data
import model
import train_inpo
from system.files import UserError
from training import budget, cache, plan, preview
from training.flags import parse
from training.latents import generators
from weights import loading

ROWS, BAD_PICTURE, BAD_CAPTION = 12, 3, 9


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A parquet file of such pairs."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, ROWS, 16, 22, 3), dtype=np.uint8)
    pictures = [[encode(Image.fromarray(p)) for p in side] for side in pixels]
    pictures[1][BAD_PICTURE] = b"no picture"
    captions = [f"a {color} circle" for color in ("red", "blue", "green", "black")] * (ROWS // 4)
    captions = pa.array(
        [b"\xff" if i == BAD_CAPTION else c.encode() for i, c in enumerate(captions)]
    )
    table = {"jpg_0": pictures[0], "jpg_1": pictures[1], "label_0": [1.0, 0.0] * (ROWS // 2)}
    file = tmp_path_factory.mktemp("noisy") / "pairs.parquet"
    pq.write_table(pa.table(table | {"caption": captions.view(pa.string())}), file)
    return file


def encode_one_by_one(patch):
    """Encoders see images and captions one by one, with the cache and without it, so that their
    values are bitwise the same."""
    prompts = model.encode_prompts

    def one_by_one(pipeline, captions, size):
        return joined([prompts(pipeline, [caption], size) for caption in captions])

    def joined(conds: list) -> dict:
        return {
            key: joined([cond[key] for cond in conds])
            if isinstance(value, dict)
            else torch.cat([cond[key] for cond in conds])
            for key, value in conds[0].items()
        }

    patch.setattr(model, "ENCODED", 1)
    patch.setattr(model, "encode_prompts", one_by_one)


@pytest.fixture(autouse=True)
def same_batches(monkeypatch):
    encode_one_by_one(monkeypatch)


@pytest.fixture
def flags(argv, noisy, tmp_path):
    """flags(name, word, ..., flag=value, ...) -> the command of a run into a folder so named."""

    def build(name: str, *words: str, **more) -> list[str]:
        given = {"data": noisy, "steps": 7, "caption_dropout": 0.5, "max_broken": 0.5} | more
        return [*argv(out=tmp_path / name, **given), *words]

    return build


def watch(monkeypatch) -> list[str]:
    """The names of the encoders that runs from now on call, in order."""
    called, load = [], train_inpo.lora.load_start

    def loaded(*given):
        pipeline = load(*given)
        for name in ("vae", "text_encoder", "text_encoder_2"):
            if part := getattr(pipeline, name, None):
                method = "encode" if name == "vae" else "forward"
                true = getattr(part, method)

                def call(*words, name=name, true=true, **options):
                    called.append(name)
                    return true(*words, **options)

                setattr(part, method, call)
        return pipeline

    monkeypatch.setattr(train_inpo.lora, "load_start", loaded)
    return called


# -------------------------------------------------------------------------------------------------
# The law.


@pytest.mark.parametrize("kind, method", [("sdxl", "inpo"), ("sd15", "sft")])
def test_with_the_cache_a_run_is_bitwise_the_run_without(
    kind, method, flags, checkpoint, tmp_path, monkeypatch
):
    """Over two epochs, mirrored or not, with dropped captions and broken rows; the encoders work
    before the first step alone, and not at all where the run is resumed."""
    model_of = {"model": checkpoint(kind), "method": method, "checkpoint_every": 3}
    if method == "sft":
        model_of["beta"] = None
    train_inpo.main(flags("live", **model_of))
    called = watch(monkeypatch)
    opened, open_encoder = [], cache.open_encoder

    def watched(*given):
        found = open_encoder(*given)
        opened.append(len(called))
        return found

    monkeypatch.setattr(cache, "open_encoder", watched)
    train_inpo.main(flags("cached", "--cache-latents", **model_of | {"steps": 3}))
    images = 1 if method == "sft" else 2
    assert called.count("vae") == (ROWS - 2) * images * 2  # mirrored, too
    assert called.count("text_encoder") == 5 and opened == [len(called)]  # 4 captions and ""
    train_inpo.main(flags("cached", "--cache-latents", **model_of))
    assert opened == [len(called)] * 2  # not once more

    assert untimed(tmp_path / "cached") == untimed(tmp_path / "live")
    one, two = weights(tmp_path / "cached"), weights(tmp_path / "live")
    assert distance(one, two) == 0 and distance(one, weights(checkpoint(kind))) > 1e-4
    said = [(tmp_path / name / "broken.jsonl").read_text() for name in ("live", "cached")]
    assert said[0] == said[1]
    assert {json.loads(line)["row"] for line in said[0].splitlines()} == {BAD_PICTURE, BAD_CAPTION}


@pytest.mark.slow
def test_two_ranks_fill_one_cache_and_train_bitwise_as_without_it(flags, tmp_path):
    launch(flags("live"), 2, "tests/test_cache.py")
    said = launch(flags("cached", "--cache-latents"), 2, "tests/test_cache.py")
    assert "encoding pairs: 100%" in said[0] and "encoding" not in said[1]
    assert len(list((tmp_path / "cached" / "latents").glob("*/pairs_*"))) == 2
    assert untimed(tmp_path / "cached") == untimed(tmp_path / "live")
    assert distance(weights(tmp_path / "cached"), weights(tmp_path / "live")) == 0


@pytest.mark.parametrize("kind, half", [("sdxl", False), ("sd15", True)])
def test_values_keep_their_precision_and_in_other_batches_differ_in_the_last_digits_alone(
    kind, half, checkpoint, noisy, tmp_path, monkeypatch
):
    """half: text in bf16, posteriors in fp16; one by one, so that not even these differ."""
    if not half:
        monkeypatch.undo()
    dtype = torch.bfloat16 if half else torch.float32
    pipeline = loading.load_pipeline(str(checkpoint(kind)), dtype=dtype)
    pairs = data.Pairs(data.read_pairs(str(noisy)), 16, seed=0, caption_dropout=0.5)
    cache.fill(tmp_path, pairs, pipeline, 2, lambda: None)
    cached = cache.Cached(pairs, pipeline, tmp_path, torch.device("cpu"))
    for n in range(0, 24, 3):
        found = []
        for encoder in (cache.Live(pairs, pipeline), cached):
            batch = data.collate([encoder.pairs[n + i] for i in range(3)])
            cond = encoder.prompts(batch["captions"])
            x0 = encoder.images(batch["pixels"], generators(0, batch["n"]))
            added = cond.get("added_cond_kwargs", {}).values()
            found.append((x0, cond["encoder_hidden_states"], *added))
        torch.testing.assert_close(*found, rtol=0, atol=0 if half else 1e-5)  # and dtypes
        assert x0.dtype == torch.float32 and cond["encoder_hidden_states"].dtype == dtype


# -------------------------------------------------------------------------------------------------
# Its files.


@pytest.fixture
def filled(checkpoint, noisy, tmp_path, monkeypatch):
    """filled(pause) -> (folder, encoded images, captions), of two files of 6 rows and one of 5
    captions."""
    pipeline = loading.load_pipeline(str(checkpoint()))
    pairs = data.Pairs(data.read_pairs(str(noisy)), 16, seed=0)
    monkeypatch.setattr(cache, "FILE", 6)

    def fill(pause=lambda: None) -> tuple[Path, int, int]:
        seen, posteriors, prompts = [0, 0], model.posteriors, model.encode_prompts

        def count(i, true, given, *rest):
            seen[i] += len(rest[0])
            return true(given, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "posteriors", lambda *given: count(0, posteriors, *given))
            patch.setattr(model, "encode_prompts", lambda *given: count(1, prompts, *given))
            (tmp_path / "key").mkdir(exist_ok=True)
            cache.fill(tmp_path / "key", pairs, pipeline, 2, pause)
        return tmp_path / "key", *seen

    return fill


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_cache_that_was_interrupted_is_filled_in_and_what_is_cut_short_is_made_anew(filled):
    def stop():
        if next(files) == 1:
            raise UserError("stop.")

    files = itertools.count()
    assert refusal(filled, stop) == "stop."
    folder, *seen = filled()
    assert seen == [5 * 4, 5]  # of the other 6 rows one is broken, too
    whole = contents(folder)
    assert sorted(whole) == ["pairs_00000.safetensors", "pairs_00001.safetensors",
                             "text_00000.safetensors"]  # fmt: skip
    assert filled()[1:] == (0, 0)
    for name, content in whole.items():
        (folder / name).write_bytes(content[:-1])
        assert filled()[1:] == ((0, 5) if "text" in name else (20, 0))
        assert contents(folder) == whole


def test_a_full_disk_is_a_sentence_and_leaves_no_file(filled, monkeypatch, tmp_path):
    def full(self, content):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    said = refusal(filled)
    assert said.startswith("--cache-latents: ") and "No space left" in said and "repeat" in said
    assert not list((tmp_path / "key").iterdir())


def test_another_set_model_size_or_flip_is_another_cache_and_the_old_one_goes(tmp_path):
    def key(fingerprint="f", resolution=16, images=2, flip=True, identity="i"):
        what = {"fingerprint": fingerprint, "resolution": resolution, "images_per_pair": images}
        args, record = SimpleNamespace(flip=flip), {"start_identity": identity}
        return cache.key(args, SimpleNamespace(**what), record)

    other = [key("g"), key(resolution=32), key(images=1), key(flip=False), key(identity="j")]
    assert len({key(), *other}) == 6 and key() == key()
    for name in other:
        (tmp_path / name).mkdir()
        (tmp_path / name / "pairs_00000.safetensors").touch()
    (tmp_path / key()).mkdir()
    for name in ("pairs_00000.safetensors", "pairs_00001.safetensors.0123.new"):
        (tmp_path / key() / name).touch()
    cache.make_room_for(tmp_path / key())
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        key(), f"{key()}/pairs_00000.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_its_size_is_that_of_its_tensors(kind, flags, checkpoint, tmp_path):
    asked = flags("run", "--cache-latents", model=checkpoint(kind), steps=1)
    train_inpo.main(asked)
    args = parse("", asked)
    planned = plan.check(args)
    at_most = cache.size(args, planned, torch.float32)
    held, kinds = 0, {"pairs": ROWS - 2, "text": 5}
    for name, count in kinds.items():
        for path in (tmp_path / "run" / "latents").glob(f"*/{name}_*"):
            with safe_open(path, "pt") as file:
                held += sum(file.get_tensor(key).nbytes for key in file.keys()) * (
                    (ROWS + (name == "text")) / count
                )  # as if all rows were whole and all captions differed
    assert 0.98 * at_most < held <= at_most
    assert f"latents of {ROWS} pairs, {at_most / 1e6:.1f} MB" in budget.disk(args, planned)


# -------------------------------------------------------------------------------------------------
# Around it.


def test_drawing_has_the_encoders_on_the_device_and_then_not():
    part = lambda: SimpleNamespace(device="cpu", to=lambda place: None)  # noqa: E731
    pipeline = SimpleNamespace(vae=part(), text_encoder=part())
    parts = [pipeline.vae, pipeline.text_encoder]
    for one in parts:
        one.to = lambda place, one=one: setattr(one, "device", place)
    with pytest.raises(KeyError), cache.encoders_on(pipeline, "cuda"):
        assert [one.device for one in parts] == ["cuda"] * 2
        raise KeyError
    assert [one.device for one in parts] == ["cpu"] * 2


def test_pictures_are_drawn_beside_a_cache_as_without_it(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "STEPS", 2)
    (tmp_path / "prompts.txt").write_text("a red circle")
    few = {"steps": 1, "sample_every": 1, "sample_prompts": tmp_path / "prompts.txt"}
    train_inpo.main(flags("live", **few))
    train_inpo.main(flags("cached", "--cache-latents", **few))
    for name in ("step_000000.png", "step_000001.png"):
        one, two = (tmp_path / run / "samples" / name for run in ("live", "cached"))
        assert one.read_bytes() == two.read_bytes()


def test_a_signal_while_the_cache_is_filled_ends_the_run_which_goes_on_there(
    flags, tmp_path, monkeypatch, capsys
):
    true, calls = model.posteriors, []

    def posteriors(*given):
        calls.append(len(given[1]))
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return true(*given)

    monkeypatch.setattr(model, "posteriors", posteriors)
    monkeypatch.setattr(cache, "FILE", 5)
    with pytest.raises(SystemExit) as stop:
        train_inpo.main(flags("run", "--cache-latents", steps=1))
    assert stop.value.code == 128 + signal.SIGTERM and calls == [16]
    assert "Stopped by SIGTERM at step 0; the same command resumes" in capsys.readouterr().out
    train_inpo.main(flags("run", "--cache-latents", steps=1))
    assert sum(calls) == (ROWS - 2) * 4


def test_what_does_not_go_with_the_cache_is_said(flags, capsys, monkeypatch):
    said = refuse(flags("run", "--cache-latents", "--crop=random"), capsys)
    assert "--cache-latents: keeps one crop" in said and "--crop center" in said
    monkeypatch.setattr(budget, "room", lambda folder: 10_000)
    said = refuse(flags("run", "--cache-latents"), capsys)
    assert "--cache-latents: what is kept of 12 pairs takes up to 0.1 MB" in said
    assert "has room for 0.0 MB" in said and "leave the flag out" in said


def test_a_run_that_sees_fewer_pictures_than_it_would_encode_is_warned(flags):
    for steps, warned in ((6, True), (7, False)):
        args = parse("", flags("run", "--cache-latents", steps=steps))
        words = plan.describe(args, plan.check(args))
        assert ("--cache-latents encodes 24" in words) == warned


if __name__ == "__main__":  # a rank, see test_two_ranks_...
    encode_one_by_one(SimpleNamespace(setattr=setattr))
    cache.FILE = 6
    train_inpo.main(sys.argv[1:])
