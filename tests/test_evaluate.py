"""Laws of evaluate.py and gallery.py.

Most run on a stub of model.py that draws toy pictures where a model samples; those of resuming and
of ranks also on a random pipeline."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from launch import free_port, start
from PIL import Image

import evaluate
import model
import toy
from evaluation import gallery, prompts, published, scorers
from system.files import ROOT, UserError
from system.lock import LOCK, alone
from weights import loading

# --------------------------------------------------------------------------------------------------
# A stub: a "model" is a folder whose name says how well it draws.

QUALITY = {"dull": (0.4, 2.0), "vivid": (0.95, 0.3)}  # saturation, blur
KINDS = {"dull": ("XL", 16), "vivid": ("XL", 16), "old": ("", 32), "large": ("XL", 128)}
CAPTIONS = toy.prompts("heldout")


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Calls of model.sample and of loading.load_any, in stub.calls and stub.loaded."""
    monkeypatch.chdir(tmp_path)
    for name, (kind, size) in KINDS.items():
        Path(name, "unet").mkdir(parents=True)
        Path(name, "unet/config.json").write_text(json.dumps({"sample_size": size}))
        index = {"_class_name": f"StableDiffusion{kind}Pipeline"}
        Path(name, "model_index.json").write_text(json.dumps(index))
    for name in ("part", "empty"):
        Path(name).mkdir()
    Path("part/config.json").write_text("{}")  # a UNet alone
    stub = types.SimpleNamespace(calls=[], loaded=[], stop=math.inf)

    def load_any(path, base=None, dtype=None):
        stub.loaded.append((path, base))
        files = sorted(Path(path).rglob("*.json"))
        config = types.SimpleNamespace(sample_size=KINDS.get(path, ("", 16))[1])
        pipeline = types.SimpleNamespace(quality=QUALITY.get(path, (0.7, 1.0)), vae_scale_factor=8)
        pipeline.unet = types.SimpleNamespace(config=config, dtype=dtype)
        pipeline.identity = f"{hash((path, *(file.read_text() for file in files))):016x}"[-16:]
        pipeline.to = lambda device: pipeline
        return pipeline

    def sample(pipeline, prompts, seeds, steps, guidance, batch=16, progress=None):
        stub.calls.append((len(prompts), steps, guidance, batch))
        if len(stub.calls) > stub.stop:
            raise KeyboardInterrupt
        rngs = [np.random.default_rng(seed) for seed in seeds]
        return [toy.draw(p, r, *pipeline.quality) for p, r in zip(prompts, rngs, strict=True)]

    monkeypatch.setattr(loading, "load_any", load_any)
    monkeypatch.setattr(model, "identity", lambda pipeline: pipeline.identity)
    monkeypatch.setattr(model, "sample", sample)
    return stub


def run(*options, models=("base=dull", "vivid"), out="out"):
    return evaluate.main(["--models", *models, "--out", out, *options])


def refused(capsys, *options, code: int = 2, **settings) -> str:
    """The sentence with which a command ends that does not come to its end."""
    with pytest.raises(SystemExit) as stop:
        run(*options, **settings)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == code and said.startswith("evaluate.py: ")
    return said


def manifest(folder) -> dict:
    return json.loads((Path(folder) / "manifest.json").read_text())


def files(folder, pattern="**/*") -> dict[str, bytes]:
    """The bytes of all files below a folder but its lock, by their place in it."""
    paths = sorted(path for path in Path(folder).glob(pattern) if path.is_file())
    paths = [path for path in paths if path.name != LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def rates(results: dict, **where) -> list[dict]:
    return [r for r in results["win_rates"] if where.items() <= r.items()]


# --------------------------------------------------------------------------------------------------
# End to end.


def test_end_to_end_the_right_model_wins(stub, capsys):
    results = run("--batch", "5")
    (rate,) = results["win_rates"]
    assert (rate["wins"], rate["losses"], rate["ties"], rate["n"]) == (18, 0, 0, 18)
    assert (rate["model"], rate["against"], rate["scorer"]) == ("vivid", "base", "preference")
    text = Path("out/table.md").read_text()
    assert "| vivid | base | 100.0 [82.4, 100.0] |" in text and "ties" not in text
    assert text in capsys.readouterr().out
    assert {call for call in stub.calls} == {(5, 12, 2.0, 5), (3, 12, 2.0, 5)}

    averages = {(r["scorer"], r["model"]): r for r in results["scores"]}
    assert [averages["faithfulness", m]["mean"] for m in ("base", "vivid")] == [1, 1]
    assert text.count("100.0 [82.4, 100.0]") == 3 and "| +0.0 |" in text
    mean = averages["preference", "base"]["mean"]
    images = [
        toy.draw(caption, np.random.default_rng(k), *QUALITY["dull"])
        for k, caption in enumerate(CAPTIONS)
    ]
    assert mean == pytest.approx(np.mean([toy.preference(image) for image in images]))
    assert f"{mean:.4f} [" in text
    assert not list(Path().rglob("*.new"))

    assert json.loads(Path("out/results.json").read_text()) == results
    listed = evaluate.__doc__.partition("results.json")[2].partition("table.md")[0]
    assert list(results) == ["models", "sets", "scores", "win_rates", "costs"]
    for record in (results["scores"][0], rate, results["sets"]["toy"]):
        assert all(key in listed for key in record), record
    assert list(results["models"]["vivid"]) == "model base architecture size identity".split()
    assert set(map(type, results["sets"]["toy"].values())) == {int, float, str}


def test_in_the_other_order_the_same_model_loses_and_against_itself_it_ties(stub):
    results = run(models=("vivid", "base=dull", "again=dull"))
    text = Path("out/table.md").read_text()
    assert "| base | vivid | 0.0 [0.0, 17.6] |" in text
    assert "| again | base | 0.0 [0.0, 17.6], ties 100.0 |" in text
    (rate,) = rates(results, model="again", against="base")
    assert rate["ties"] == rate["n"] == 18


def test_manifest_says_which_prompt_and_seed_and_weights_gave_each_image(stub):
    run("--first-seed", "7", "--seeds", "2", "--steps", "3", "--guidance", "4")
    base, vivid = (manifest(f"out/images/toy/{name}") for name in ("base", "vivid"))
    assert base["images"] == vivid["images"] and len(base["images"]) == 36
    assert (base["name"], base["model"], vivid["model"]) == ("base", "dull", "vivid")
    settings = {"steps": 3, "guidance": 4.0, "batch": 16, "dtype": "float32", "size": 128}
    settings |= {"architecture": "sdxl", "set": "toy", "prompts": 18, "base": None}
    settings |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
    assert settings.items() <= base.items()
    assert len(base["identity"]) == 16 and base["identity"] != vivid["identity"]
    assert all(key in gallery.__doc__ for key in [*base, *base["images"][0]])
    assert {call[1:3] for call in stub.calls} == {(3, 4.0)}
    shown = [(e["prompt"], e["seed"]) for e in base["images"]]
    assert shown == [(CAPTIONS[k % 18], 7 + k) for k in range(36)]
    for entry in base["images"]:
        expected = toy.draw(entry["prompt"], np.random.default_rng(entry["seed"]), *QUALITY["dull"])
        image = Image.open(Path("out/images/toy/base", entry["file"]))
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    kept = json.loads(Path("out/scores.json").read_text())["toy"]
    assert [(e["prompt"], e["seed"]) for e in kept["images"]] == shown
    assert kept["files"]["vivid"] == [f"{k:05d}.png" for k in range(36)]
    lengths = [len(kept["scores"][m][s]) for m in ("base", "vivid") for s in published.TOY]
    assert lengths == [36] * 4


def test_the_same_seed_gives_the_same_file(stub):
    run(out="one")
    run("--batch", "7", out="two")
    run("--first-seed", "1", out="three")
    one, two, three = (
        list(files(out, "images/*/*/*.png").values()) for out in "one two three".split()
    )
    assert len(one) == 36 and one == two
    assert not set(one) & set(three) - {one[1]} and one != three
    assert files("one", "*.*") == files("two", "*.*") and len(files("one", "*.*")) == 5


def test_picture_shows_prompts_evenly_spaced_and_models_side_by_side(stub):
    names = ["base", "vivid", "third", "fourth"]
    for n in (2, 4):
        models = ("base=dull", "vivid", "third=vivid", "fourth=dull")[:n]
        run("--scorers", "faithfulness", models=models, out=f"out{n}")
    for n, rows, right in ((2, 4, 0), (2, 4, 1), (4, 8, 0)):  # models, rows of a block, the block
        picture = Image.open(f"out{n}/toy.png").convert("RGB")
        end = picture.width // 2 * (1 + right) if rows == 4 else picture.width
        x0, y0 = end - 16 - n * 128 - (n - 1) * 8, picture.height - 16 - rows * 128 - (rows - 1) * 8
        for i, k in enumerate([0, 2, 5, 7, 10, 12, 15, 17][rows * right :][:rows]):
            for j, name in enumerate(names[:n]):
                x, y = x0 + j * 136, y0 + i * 136
                shown = np.asarray(picture.crop((x, y, x + 128, y + 128)))[::2, ::2]
                file = f"out{n}/images/toy/{name}/{k:05d}.png"
                assert np.array_equal(shown, np.asarray(Image.open(file))), (n, i, j)


CATEGORIES = "Category\tPrompt\n" + "".join(
    f"{'warm' if 'red' in text else 'cold'}\t{text}\n" for text in toy.prompts()[::9]
)


def test_several_prompt_sets_are_judged_side_by_side_and_by_category(stub):
    Path("some.tsv").write_text(CATEGORIES)
    results = run("--prompts", "toy", "some.tsv", "--seeds", "3")
    images = {key: about["images"] for key, about in results["sets"].items()}
    assert images == {"toy": 54, "some": 24} and results["sets"]["some"]["prompts"] == 8
    (whole,) = rates(results, set="some", category=None)
    parts = [r for r in rates(results, set="some") if r["category"]]
    assert {r["category"]: r["n"] for r in parts} == {"warm": 6, "cold": 18}
    assert sum(r["wins"] for r in parts) == whole["wins"] == 24
    assert len(rates(results, set="toy")) == 1
    text = Path("out/table.md").read_text()
    assert "| model | against | toy: preference | some: preference |" in text
    assert "### toy" in text and "### some" in text and "| warm (6) | cold (18) |" in text
    assert manifest("out/images/some/base")["images"][0]["category"] == "warm"
    assert Image.open("out/some.png").height < Image.open("out/toy.png").height * 1.1
    assert stub.loaded == [("dull", None), ("vivid", None)] * 2  # checked, then drawn from


def test_a_limit_keeps_images_of_the_full_set_evenly_spaced(stub):
    run("--seeds", "2", out="full")
    results = run("--seeds", "2", "--limit", "4", out="some")
    kept = manifest("some/images/toy/base")["images"]
    assert [entry["seed"] for entry in kept] == [0, 6, 11, 17, 18, 24, 29, 35]
    assert (results["sets"]["toy"]["prompts"], results["sets"]["toy"]["images"]) == (4, 8)
    full, some = files("full/images", "*/*/*.png"), files("some/images", "*/*/*.png")
    assert len(some) == 16 and some.items() <= full.items()
    given = run("--limit", "4", models=("base=full/images/toy/base", "vivid=some/images/toy/vivid"))
    assert given["win_rates"] == results["win_rates"] and given["scores"] == results["scores"]


def test_scorers_are_those_of_the_prompts_by_default(stub, monkeypatch):
    checked, loaded = [], []

    def load(name, folder, device):
        loaded.append((name, folder))
        return lambda images, texts: [float(len(text)) for text in texts]

    red, dog = "a red circle on a white background", "a photo of a dog"
    Path("toys.txt").write_text(f"{red}\n\n a blue cross on a gray background \n")
    results = run("--prompts", "toys.txt", "--scorers", "preference", "preference", out="toys")
    assert results["sets"]["toys"]["images"] == 2
    assert [r["scorer"] for r in results["scores"]] == ["preference"] * 2
    assert "faithfulness" not in Path("toys/table.md").read_text()

    monkeypatch.setattr(scorers, "check", lambda *how: checked.append(how))
    monkeypatch.setattr(scorers, "load", load)
    monkeypatch.setattr(toy, "draw", lambda *how: Image.new("RGB", (9, 9)))
    Path("dogs.txt").write_text(f"{red}\n{dog}")
    run("--prompts", "dogs.txt", "--scorer-folder", "copies")
    names = ["aesthetic", "pickscore", "hps", "clip"]
    assert checked == [(name, [red, dog], Path("copies")) for name in names]
    assert loaded == [(name, Path("copies")) for name in names]
    text = Path("out/table.md").read_text()
    assert "| dogs: Aesthetic | dogs: PickScore | dogs: HPS v2.1 | dogs: CLIP |" in text
    checked.clear()
    run("--prompts", "toys.txt", out="default")
    assert [name for name, *_ in checked] == ["preference", "faithfulness"]


def test_settings_default_to_those_of_the_family(stub):
    for name, settings in {"dull": (12, 2, 16), "large": (50, 5, 4), "old": (50, 7.5, 16)}.items():
        run("--prompts", "toy", "--limit", "2", models=(f"a={name}", f"b={name}"), out=name)
        found = manifest(f"{name}/images/toy/a")
        assert (found["steps"], found["guidance"], found["batch"]) == settings


def test_a_unet_is_put_into_the_first_pipeline_or_into_base(stub):
    for options, base in (([], "vivid"), (["--base", "dull"], "dull")):
        stub.loaded.clear()
        run("--limit", "2", *options, models=("a=part", "b=vivid", "c=dull"), out=base)
        assert set(stub.loaded) == {("part", base), ("vivid", None), ("dull", None)}
        assert manifest(f"{base}/images/toy/a")["base"] == base


def test_published_rates_stand_beside_ours_at_full_size_and_of_the_whole_set(stub, monkeypatch):
    monkeypatch.setattr(scorers, "check", lambda *how: None)
    monkeypatch.setattr(scorers, "load", lambda *how: lambda images, texts: [len(t) for t in texts])
    everything = prompts.PromptSet("parti", CAPTIONS, None)
    monkeypatch.setattr(evaluate, "read_prompts", lambda source: everything)
    monkeypatch.setitem(published.PUBLISHED_PROMPTS, "parti", 18)
    clip, large = ("--prompts", "parti", "--scorers", "clip"), ("base=large", "InPO=large")
    run(*clip, models=large, out="all")
    assert " (50.55)" in Path("all/table.md").read_text()
    run(*clip, "--limit", "17", models=large, out="part")
    run(*clip, "--steps", "25", models=large, out="steps")
    run(*clip, models=("base=dull", "inpo=vivid"), out="tiny")
    for out in ("part", "tiny", "steps"):
        assert "ublished" not in Path(out, "table.md").read_text()
    places = [f"{name}=all/images/parti/{name}" for name in ("base", "InPO")]
    run(*clip[2:], models=places, out="again")  # images drawn here know their architecture
    assert Path("again/table.md").read_text() == Path("all/table.md").read_text()
    for folder in ("base", "InPO"):
        Path("all/images/parti", folder, "manifest.json").unlink()
    run(*clip, models=places, out="foreign")
    assert "ublished" not in Path("foreign/table.md").read_text()


COST = {"method": "inpo", "steps": 60, "pairs": 960, "unet_calls": 18240, "flops": 1.2e15}
COST |= {"seconds": 61.2, "devices": 1, "device": "CPU", "device_hours": 0.017}
COST |= {"peak_memory": 2**30}


def test_what_training_cost_is_shown_for_models_that_know(stub):
    Path("vivid/cost.json").write_text(json.dumps(COST))
    assert run("--limit", "2")["costs"] == {"vivid": COST}
    row = "| vivid | inpo | 60 | 960 | 18,240 | 1.20e+15 | 0:01:01 | 0.017 (1 x CPU) | 1.00 |"
    assert row in Path("out/table.md").read_text()
    given = run(models=("a=out/images/toy/base", "b=out/images/toy/vivid"), out="given")
    assert given["costs"] == {"b": COST}


# --------------------------------------------------------------------------------------------------
# Going on where it was interrupted, and what lies in --out already.


def test_an_interrupted_run_goes_on_to_the_same_bytes(stub, capsys):
    run("--batch", "5", out="whole")
    stub.calls, stub.stop = [], 6  # the second model's third batch
    assert "interrupted; the same command resumes." in refused(capsys, "--batch", "5", code=130)
    folder = Path("out/images/toy/vivid")
    assert len(list(folder.glob("*.png"))) == 10 and not Path("out/table.md").exists()
    (folder / "00003.png").rename(folder / "00003.png.0a1b2c3d.new")  # as a kill leaves it
    stub.calls, stub.stop = [], math.inf
    run("--batch", "5")
    assert [n for n, *_ in stub.calls] == [5, 5, 3]  # batch 0 again, 2 and 3
    assert files("out") == files("whole")


def test_what_is_complete_is_not_drawn_again(stub):
    results = run()
    before, stub.calls, stub.loaded = files("out"), [], []
    assert run() == results and files("out") == before and not stub.calls
    assert stub.loaded == [("dull", None), ("vivid", None)]  # for their identity


def test_a_table_of_other_models_is_kept_under_its_date(stub, capsys):
    names, seen = ("scores.json", "results.json", "table.md", "toy.png", "index.html"), []
    for day, models in enumerate(
        (("a=dull", "b=vivid"), ("b=vivid", "a=dull"), ("b=vivid", "old"))
    ):
        capsys.readouterr()
        run("--limit", "2", "--steps", "9", "--guidance", "2", "--prompts", "toy", models=models)
        said = capsys.readouterr().out
        seen.append({name: Path("out", name).read_bytes() for name in names})
        for name in names:
            os.utime(Path("out", name), (1.7e9, 1.7e9))  # all on 2023-11-14
        assert ("The earlier results, of other models or settings, are kept as" in said) == (
            day > 0
        )
    assert (
        "scores-2023-11-14-2.json, results-2023-11-14-2.json, table-2023-11-14-2.md, toy-" in said
    )
    for tag, content in zip(("-2023-11-14", "-2023-11-14-2", ""), seen, strict=True):
        for name in names:
            stem, _, suffix = name.partition(".")
            assert Path("out", f"{stem}{tag}.{suffix}").read_bytes() == content[name]
    assert len(files("out", "*.*")) == 15


def test_settings_that_drew_no_image_yet_may_change(stub, capsys, monkeypatch):
    """Such as a batch that is too large for the GPU."""

    def too_large(*how):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.\\nGPU 0 has a total of ...")

    with monkeypatch.context() as patch:
        patch.setattr(model, "sample", too_large)
        assert "memory is too small; give a smaller --batch and" in refused(capsys)
        assert Path("out/images/toy/base/failed").exists()  # for the other ranks to find
        patch.setattr(loading, "load_any", too_large)
        assert "memory is too small; free some" in refused(capsys)
    run("--batch", "5")
    assert manifest("out/images/toy/base")["batch"] == 5


def test_a_rank_that_fails_stops_the_others_before_their_next_batch(stub, tmp_path, monkeypatch):
    """What another rank does, whose GPU is too small, happens here amid this one's second batch."""
    draw, others = model.sample, iter([None, (tmp_path / "failed").touch])

    def sample(*how):
        if fail := next(others):
            fail()
        return draw(*how)

    about = {"set": "toy", "prompts": 18, "steps": 1, "guidance": 1.0, "batch": 4}
    about |= {"images": gallery.plan_images(prompts.PromptSet("toy", CAPTIONS, None))}
    pipeline = types.SimpleNamespace(quality=(0.7, 1.0))
    with monkeypatch.context() as patch:
        patch.setattr(model, "sample", sample)
        gallery.generate(pipeline, tmp_path, about)
    assert len(list(tmp_path.glob("*.png"))) == 8
    gallery.generate(pipeline, tmp_path, about)  # the next try begins without it
    assert len(list(tmp_path.glob("*.png"))) == 18 and not (tmp_path / "failed").exists()


OTHER = {
    "steps: 12 there, 3 now": ["--steps", "3"],
    "guidance: 2.0 there, 3.0 now": ["--guidance", "3"],
    "batch: 16 there, 5 now": ["--batch", "5"],
    "seed of image 0: 0 there, 9 now": ["--first-seed", "9"],
    "images: 18 there, 36 now": ["--seeds", "2"],
    "prompts: 18 there, 9 now; images: 18 there, 9 now": ["--limit", "9"],
    "prompt of image 0: a red circle on a black background there, a red": ["--prompts", "toy.txt"],
}


def test_other_settings_for_the_same_folder_are_refused(stub, capsys):
    Path("toy.txt").write_text("a red cross on a white background\n" * 18)
    run()
    before = files("out")
    for sentence, options in OTHER.items():
        error = refused(capsys, *options)
        assert sentence in error and "out/images/toy/base" in error
        assert error.endswith("name another --out, or delete that folder.") and len(error) < 700
    assert files("out") == before


def test_other_weights_or_libraries_and_pictures_of_others_are_refused(stub, capsys, monkeypatch):
    run()
    with monkeypatch.context() as patch:
        patch.setattr(diffusers, "__version__", "9.9.9")
        assert "9.9.9 now" in refused(capsys)
    Path("vivid/unet/config.json").write_text('{"trained": "further", "sample_size": 16}')
    Path("out/images/toy/base/00000.png").unlink()  # is not drawn either
    stub.calls.clear()
    error = refused(capsys)
    assert "'out/images/toy/vivid' holds other images (identity: " in error and not stub.calls
    Path("out/images/toy/base/manifest.json").write_text('{"images": [')
    assert "manifest.json cannot be read (Expecting value" in refused(capsys)
    Path("out/images/toy/base/manifest.json").unlink()
    assert "holds pictures without a manifest" in refused(capsys)


def test_a_second_job_in_the_folder_is_refused_until_the_first_ends(stub, capsys):
    """Even where both began to check before either wrote: the second would delete the first's."""
    told = "--out out: another job is writing there; wait for it, or name another folder."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "check_out", lambda out: None)
        with alone(Path("out")):
            assert told in refused(capsys) and stub.loaded
    assert not files("out") and not stub.calls
    stub.loaded.clear()
    with alone(Path("out")):
        assert told in refused(capsys) and not stub.loaded
    run()


# --------------------------------------------------------------------------------------------------
# Folders of images.


def test_images_drawn_here_are_judged_without_their_models(stub):
    results = run("--steps", "3", "--first-seed", "5")
    stub.loaded.clear()
    for name in QUALITY:
        shutil.rmtree(name)
    places = ("base=out/images/toy/base", "out/images/toy/vivid")
    assert run(models=places, out="again") == results  # all of it is in the manifests
    assert not stub.loaded
    assert Path("again/toy.png").read_bytes() == Path("out/toy.png").read_bytes()
    rows = "".join(f"{text}\t{text.split()[2]}\n" for text in CAPTIONS)
    Path("shapes.tsv").write_text("Prompt\tCategory\n" + rows)
    shapes = run("--prompts", "shapes.tsv", models=places, out="again")
    assert {r["category"] for r in shapes["win_rates"]} == {None, *toy.SHAPES}


def elsewhere(folder, names):
    """Vivid pictures of the held-out captions, named in the given order."""
    Path(folder).mkdir(parents=True)
    for k, name in enumerate(names):
        rng = np.random.default_rng(100 + k)
        toy.draw(CAPTIONS[k % 18], rng, *QUALITY["vivid"]).save(Path(folder) / name)


def test_pictures_from_elsewhere_are_taken_in_natural_order(stub, capsys):
    elsewhere("theirs", [f"image-{k}.png" for k in range(36)])
    elsewhere("more", [f"{k}.{'jpg' if k % 2 else 'PNG'}" for k in range(36)])
    Path("theirs/readme.txt").write_text("no picture")
    Path("theirs/.hidden.png").write_text("no picture")
    results = run("--prompts", "toy", "--seeds", "2", models=("base=dull", "theirs", "more"))
    averages = {(r["scorer"], r["model"]): r["mean"] for r in results["scores"]}
    assert averages["faithfulness", "theirs"] == averages["faithfulness", "more"] == 1
    assert [r["wins"] for r in rates(results, against="base")] == [36, 36]
    assert "seeds and settings theirs, more drew toy is not fully known" in capsys.readouterr().out
    assert results["sets"]["toy"]["steps"] is results["sets"]["toy"]["first_seed"] is None
    assert "seeds not known for all models" in Path("out/table.md").read_text()
    few = run("--prompts", "toy", "--limit", "6", models=("theirs", "more"), out="few")
    kept = json.loads(Path("few/scores.json").read_text())["toy"]
    assert kept["files"]["theirs"][:3] == ["image-0.png", "image-3.png", "image-7.png"]
    assert few["sets"]["toy"]["images"] == 12


def test_a_run_with_pictures_in_its_folder_is_a_model(stub):
    Image.new("RGB", (8, 8)).save("vivid/curves.png")
    assert not gallery.is_gallery("vivid") and gallery.is_gallery("empty") is False


def test_a_run_without_a_model_and_a_checkpoint_name_the_command_that_exports_them(stub, capsys):
    step = Path("run/checkpoints/step_000020")
    step.mkdir(parents=True)
    for file in ("run/run.json", step / "checkpoint.json"):
        Path(file).write_text("{}")
    Image.new("RGB", (8, 8)).save("run/curves.png")
    for path in ("run", str(step)):
        error = refused(capsys, models=("dull", path))
        assert f"`python -m training.export {path}` writes a model from" in error


def spoil(**changes):
    """Change the manifest of out/images/toy/vivid."""
    path = Path("out/images/toy/vivid/manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_images_drawn_with_other_settings_or_seeds_are_not_compared(stub, capsys):
    run()
    places = {"models": ("a=out/images/toy/base", "b=out/images/toy/vivid"), "out": "again"}
    before = manifest("out/images/toy/vivid")
    changes = {"steps": 50, "guidance": 5.0, "dtype": "float16"}
    for key, value in changes.items():
        spoil(**before | {key: value})
        assert f"{key} is {before[key]} for a and {value} for b" in refused(capsys, **places)
    images = [dict(entry) for entry in before["images"]]
    images[5]["seed"] = 77
    spoil(images=images, dtype="float32")
    assert "seed of image 5 is 5 for a and 77 for b" in refused(capsys, **places)
    spoil(images=before["images"] * 2)
    assert "number of images is 18 for a and 36 for b" in refused(capsys, **places)
    images[5]["prompt"] = "a dog"
    spoil(images=images)
    told = "'out/images/toy/vivid' shows other prompts than toy: image 5 of 18 is 'a dog', not 'a"
    assert told in refused(capsys, **places)
    spoil(**before | {"batch": 3, "identity": "0" * 16, "torch": "1.0", "name": "x", "model": "y"})
    assert run(**places)["win_rates"][0]["wins"] == 18
    spoil(**before | {"steps": None, "guidance": None})
    assert run(**places)["sets"]["toy"]["steps"] is None
    spoil(**before)
    new = {"models": ("a=out/images/toy/base", "b=vivid"), "out": "new"}
    assert "steps is 12 for a and 3 for b" in refused(capsys, "--steps", "3", **new)
    assert run(**new)["win_rates"][0]["wins"] == 18  # the prompts are those of the manifest


def test_what_goes_wrong_amid_the_work_is_one_sentence_too(stub, capsys, monkeypatch):
    def full(*how):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gallery, "write", full)
        assert "No space left on device" in refused(capsys)
        scores = iter([0.5] * 17 + [math.nan] * 99)
        patch.undo()
        patch.setattr(scorers, "load", lambda *how: lambda _, texts: [next(scores) for _ in texts])
        told = "the score of 'out/images/toy/base/00017.png' is nan, no finite number."
        assert told in refused(capsys)
    file = Path("out/images/toy/vivid/00004.png")
    file.write_bytes(file.read_bytes()[:200])
    assert "'out/images/toy/vivid/00004.png' cannot be read as a picture" in refused(capsys)


# --------------------------------------------------------------------------------------------------
# Mistakes: one sentence, before anything is loaded or drawn.

MISTAKES = {
    "at least two models": ["--models", "dull"],
    "two models are named 'Dull'": ["--models", "dull", "Dull=vivid"],
    "'nowhere': there is no folder of that name here": ["--models", "dull", "nowhere"],
    "'empty' is not a pipeline, UNet or LoRA": ["--models", "dull", "empty"],
    "'a/b=dull' is not NAME=PATH": ["--models", "a/b=dull", "vivid"],
    "'..' is not NAME=PATH": ["--models", "..", "vivid"],
    "'x=' is not NAME=PATH": ["--models", "x=", "vivid"],
    "--base 'part' is no pipeline": ["--base", "part"],
    "with --base.": ["--models", "part", "again=part"],
    "invalid choice: 'beauty' (choose from 'preference', 'faith": ["--scorers", "clip", "beauty"],
    "'nothing.txt' cannot be read": ["--prompts", "nothing.txt"],
    "'blank.txt' holds no prompt": ["--prompts", "blank.txt"],
    "two of --prompts are named 'toy'": ["--prompts", "toy", "toy.txt"],
    "the prompt set '-x' cannot name a folder": ["--prompts", "./-x.txt"],
    "--prompts is needed": ["--models", "a=large", "b=large"],
    "--prompts must be a single set": ["--models", "dull", "few", "--prompts", "toy", "dogs.txt"],
    "'few' holds 5 pictures, no multiple of the 18 prompts of toy": [
        "--models", "dull", "few", "--prompts", "toy",
    ],
    "'broken/2.png' cannot be read as a picture (is no picture that can be read (PNG": [
        "--models", "dull", "broken", "--prompts", "two.txt",
    ],
    "number of images is 18 for dull and 36 for many": [
        "--models", "dull", "many", "--prompts", "toy",
    ],
    "'a photo of a dog' is not a toy caption": ["--prompts", "dogs.txt", "--scorers", "preference"],
    "there is no folder 'nowhere'": ["--scorers", "clip", "--scorer-folder", "nowhere"],
    "--out 'blank.txt' is a file": ["--out", "blank.txt"],
    "--out 'blank.txt/out' is a file": ["--out", "blank.txt/out"],
    "--seeds must be at least 1": ["--seeds", "0"],
    "--first-seed must be at least 0": ["--first-seed", "-1"],
    "--steps must be at least 1": ["--steps", "0"],
    "--batch must be at least 1": ["--batch", "0"],
    "--limit must be at least 1": ["--limit", "0"],
    "--guidance must be at least 1": ["--guidance", "0.9"],
    "argument --guidance: 'nan' is not a finite number": ["--guidance", "nan"],
    "differ in their usual guidance (large 5, old 7.5)": ["--models", "large", "old"],
    "differ in their usual steps (dull 12, old 50)": ["--models", "dull", "old"],
    "spent/cost.json is damaged; delete it": ["--models", "dull", "spent"],
    "unrecognized arguments: --seed-s": ["--seed-s", "1"],
}  # fmt: skip


@pytest.mark.parametrize("sentence", MISTAKES)
def test_each_mistake_gives_one_sentence_and_exit_code_2(sentence, stub, capsys):
    red = "a red circle on a white background\n"
    texts = {"blank": " \n\n", "dogs": f"{red}a photo of a dog\n", "two": red * 2}
    for name, text in (texts | {"toy": red, "-x": red}).items():
        Path(f"{name}.txt").write_text(text)
    for folder, count in {"few": 5, "many": 36, "broken": 1}.items():
        Path(folder).mkdir()
        for k in range(count):
            Image.new("RGB", (8, 8)).save(f"{folder}/{k}.png")
    Path("broken/2.png").write_text("no picture")
    shutil.copytree("vivid", "spent")
    Path("spent/cost.json").write_text('{"method": "inpo"}')
    with pytest.raises(SystemExit) as stop:
        run(*MISTAKES[sentence])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("evaluate.py: error: ") and sentence in error
    assert error.count("\n") == 1
    assert not stub.calls and not Path("out").exists()


def test_each_rank_draws_in_half_precision_on_its_own_gpu(stub, capsys, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    run("--limit", "2")
    assert chosen == [torch.device("cuda:3")]
    assert manifest("out/images/toy/base")["dtype"] == "float16"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(UserError, match="process 3 of a machine has no GPU; start 3 processes."):
        gallery.device()


EXAMPLES = (
    "--models base=tiny aligned=out/demo/aligned --prompts toy --seeds 16",
    "--models base=sdxl inpo=JaydenLu666/InPO-SDXL --prompts parti",
    "torchrun --nproc_per_node 8 evaluate.py",
    "pytorch_lora_weights.safetensors",
    "theirs=pictures/parti",
)


def test_help_and_wrong_flags_are_answered_from_any_folder_before_the_slow_imports(tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "evaluate.py")]
    for options, code in ((["--help"], 0), (["--models", "a", "b", "--seeds", "0"], 2)):
        ended = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)
        imported = {line.split("|")[-1].strip() for line in ended.stderr.splitlines()}
        assert ended.returncode == code and "evaluation.published" in imported
        assert not imported & {"torch", "numpy", "transformers", "diffusers"}
        if code == 0:
            assert all(words in ended.stdout for words in EXAMPLES)
            assert "local_rank" not in ended.stdout and "local-rank" not in ended.stdout
        else:
            assert ended.stderr.endswith("evaluate.py: error: --seeds must be at least 1.\n")


# --------------------------------------------------------------------------------------------------
# A random pipeline and a UNet of its kind: a real kill, and two real processes.


@pytest.fixture(scope="module")
def real(checkpoint, tmp_path_factory):
    """(a command line without --out, the folder of what it gives in one go)."""
    folder = tmp_path_factory.mktemp("real")
    unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint(), subfolder="unet")
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(0.9)
    unet.save_pretrained(folder / "other/unet")
    (folder / "some.tsv").write_text(CATEGORIES)
    argv = ["--models", f"base={checkpoint()}", f"other={folder / 'other'}", "--prompts"]
    argv += [str(folder / "some.tsv"), "--seeds", "3", "--steps", "2", "--batch", "5"]
    evaluate.main([*argv, "--out", str(folder / "whole")])
    return argv, folder / "whole"


def test_a_killed_run_goes_on_to_the_same_bytes(real, tmp_path):
    argv, whole = real
    (child,) = start([*argv, "--out", str(tmp_path / "out")], 1, "evaluate.py")
    folder = tmp_path / "out/images/some/base"
    while not (folder / "00007.png").exists() and child.returncode is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    there = len(list((tmp_path / "out").rglob("*.png")))
    assert 8 <= there < 48 and not (tmp_path / "out/results.json").exists()
    evaluate.main([*argv, "--out", str(tmp_path / "out")])
    assert files(tmp_path / "out") == files(whole)


TWICE = """
import os, sys, evaluate
from system import processes
argv = [*sys.argv[1:], "--local_rank=" + os.environ["RANK"]]
try:
    evaluate.main([*argv, "--base", "nowhere"])  # found by rank 0 alone
except SystemExit as stop:
    assert stop.code == 2
    print("refused", file=sys.stderr)
os.environ["MASTER_PORT"] = os.environ["NEXT"]
evaluate.main(argv)
assert not processes.dist.is_initialized() and not processes.patient_group.cache_info().currsize
"""


def test_two_ranks_give_the_files_of_one_and_say_a_mistake_once(real, tmp_path):
    """And they leave their group, so that the next command in the same processes can join."""
    argv, whole = real
    children = start([*argv, "--out", str(tmp_path)], 2, TWICE, NEXT=free_port())
    ends = [child.communicate(timeout=200) for child in children]
    assert [child.returncode for child in children] == [0, 0], ends
    (out, error), (quiet, hushed) = ends
    assert files(tmp_path) == files(whole)
    assert out.rstrip().endswith((whole / "table.md").read_text().rstrip()) and quiet == ""
    assert error.count("evaluate.py: error: ") == 1 and hushed == "refused\n"


ENDS = """
import os, signal, sys
from datetime import timedelta
import evaluate
from system import processes

evaluate.gallery.JUDGED = 2  # images at a time, so that each rank has some
modules = {"roll_call": processes, "init_process_group": processes.dist}
modules |= {"sample": evaluate.gallery.model, "open_image": evaluate.gallery}
name = sys.argv.pop(1)
if modules[name] in (processes, processes.dist):
    processes.FORMING = timedelta(seconds=2)  # in place of minutes
before = getattr(modules[name], name)

def then_end(*given, **options):
    result = before(*given, **options)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(modules[name], name, then_end)
evaluate.main(sys.argv[1:])
"""


@pytest.mark.parametrize("when", ["roll_call", "init_process_group", "sample", "open_image"])
def test_a_killed_rank_ends_the_others_with_one_sentence(when, real, tmp_path):
    """While they join, draw and judge; and the same command goes on."""
    argv, whole = real
    argv = [*argv, "--limit", "2", "--scorers", "preference", "--out", str(tmp_path / "out")]
    left, killed = start([when, *argv], 2, ENDS)
    said, _ = left.communicate(timeout=60)[1], killed.communicate()
    assert (left.returncode, killed.returncode) == (1, -signal.SIGKILL), said
    assert said.splitlines()[-1].startswith("evaluate.py: error: rank 0: another rank is gone; ")
    assert "Traceback" not in said and "[W" not in said


def test_ranks_share_the_batches_of_drawing_and_of_scoring(stub, monkeypatch):
    run("--seeds", "2")
    folder, drawn, judged = Path("out/images/toy/base"), {}, {}
    images = manifest(folder)["images"]

    def judge(pictures, prompts):
        judged[r].append(len(prompts))
        return [1.0] * len(prompts)

    others = dict.fromkeys(range(36), 2.0)
    gather = lambda value: [value, others] if value else [value]  # noqa: E731
    monkeypatch.setattr(gallery.processes, "gather", gather)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for r in range(3):
        monkeypatch.setenv("RANK", str(r))
        judged[r] = []
        assert gallery.score(folder, images, judge) == [2.0] * 36  # the ranks' numbers together
        batches = gallery.missing(Path("nowhere"), {"images": images, "batch": 10})
        drawn[r] = [images.index(batch[0]) for batch in batches]
    assert drawn == {0: [0, 30], 1: [10], 2: [20]}
    assert judged == {0: [16], 1: [16], 2: [4]}


def test_images_and_scores_can_be_had_without_the_command_line(real, checkpoint, tmp_path):
    """As another script draws and judges: the files are those of the command."""
    _, whole = real
    there = manifest(whole / "images/some/base")
    about = "name model base architecture set prompts steps guidance batch".split()
    pipeline = loading.load_any(str(checkpoint()))
    images = gallery.plan_images(prompts.read(str(whole.parent / "some.tsv")), seeds=3)
    made = gallery.describe(pipeline, images, **{key: there[key] for key in about})
    evaluate.generate(pipeline, tmp_path, made)
    assert files(tmp_path, "*.png") == files(whole / "images/some/base", "*.png")
    with pytest.raises(UserError, match="steps: 2 there, 3 now"):
        evaluate.generate(pipeline, tmp_path, made | {"steps": 3})
    values = evaluate.score(tmp_path, images, scorers.load("preference"))
    kept = json.loads((whole / "scores.json").read_text())["some"]["scores"]["base"]
    assert values == kept["preference"]
