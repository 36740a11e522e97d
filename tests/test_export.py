"""export.py: what comes out of a checkpoint is what the run wrote, in every form and precision."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import pytest
import torch
from conftest import small_disk
from launch import launch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model
import train_inpo
from system import hub
from system.files import ROOT
from training import export, lora, plan
from weights import loading

ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def runs(checkpoint, pairs, tmp_path_factory):
    """Three runs: "full" and "lora" by two ranks under ZeRO-3; "merged", by one rank in bf16, has
    new adapters on a model that "lora" was merged into."""
    root = tmp_path_factory.mktemp("runs")
    config = json.loads((ROOT / "ds_config.json").read_text())
    (root / "2.json").write_text(json.dumps(config))
    (root / "3.json").write_text(json.dumps(config | {"zero_optimization": ZERO}))

    def command(name: str, stage: int, **flags) -> list[str]:
        flags = {
            "model": checkpoint(), "data": pairs, "out": root / name, "batch": 2, "micro_batch": 1,
            "ds_config": root / f"{stage}.json", "steps": 2, "lr": 1e-2, "warmup": 0, "workers": 0,
            "sample_every": 0, "checkpoint_every": 1, "export_every": 1,
        } | flags  # fmt: skip
        return [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]

    both = command("full", 3), command("lora", 3, lora_rank=2, lora_alpha=6)
    (root / "both.json").write_text(json.dumps(both))
    launch([str(root / "both.json")], 2, "tests/many.py")
    gpu = SimpleNamespace(device_name=lambda: "cuda")  # on a CPU the plan takes fp32
    with mock.patch.object(plan, "get_accelerator", lambda: gpu):
        merged = {"lora": root / "lora", "lora_start": "merge", "lora_rank": 4}
        train_inpo.main(command("merged", 2, **merged))
    return root


def write(tmp_path, path: Path, *flags: str) -> Path:
    out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    export.main([str(path), f"--out={out}", *flags])
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all safetensors below a folder, by file and name; text encoders have a prefix
    or not."""
    files = {path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")}
    named = {f"{file}: {k}": w for file, held in files.items() for k, w in held.items()}
    return {name.replace(": text_model.", ": "): w for name, w in named.items()}


def described(file: Path) -> dict:
    """The metadata of a LoRA file, without the order of its lists, which are sets in peft."""
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    found = json.loads(metadata.get("lora_adapter_metadata", json.dumps(metadata)))
    return {k: sorted(v) if isinstance(v, list) else v for k, v in found.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def predict(pipeline) -> torch.Tensor:
    x, t = torch.linspace(-2, 2, 512).reshape(2, 4, 8, 8), torch.tensor([9, 500])
    cond = model.encode_prompts(pipeline, ["a red circle", "a blue circle"], 16)
    with torch.no_grad():
        return model.predict_noise(pipeline.unet, x, t, cond, model.alphas_cumprod(pipeline))


def by_hand(pipeline, path: Path, scale: float):
    """W + scale B A in the place of W, from the file's own tensors."""
    file = load_file(path / hub.LORA)
    with torch.no_grad():
        for key in [key for key in file if key.endswith(".lora_A.weight")]:
            module = key.removeprefix("unet.").removesuffix(".lora_A.weight")
            change = scale * file[key.replace("lora_A", "lora_B")] @ file[key]
            assert change.abs().max() > 1e-4  # the adapters have learned something
            pipeline.unet.get_submodule(module).weight += change
    return pipeline


# -------------------------------------------------------------------------------------------------
# The same model as the run's own.


@pytest.mark.parametrize("name", ["full", "lora", "merged"])
def test_the_export_of_the_last_checkpoint_is_what_the_run_wrote(
    name, runs, checkpoint, tmp_path, capsys
):
    out = write(tmp_path, runs / name)
    assert "Warning" not in capsys.readouterr().err
    for file in [path.relative_to(out) for path in out.rglob("*") if path.is_file()]:
        if file.name == "result.json":  # it lists cost.json and curves.png of a run, too
            there, ours = (json.loads((f / file).read_text())["files"] for f in (runs / name, out))
            assert ours.items() <= there.items()
        elif file.name in (hub.LORA, hub.KOHYA_LORA):
            assert described(out / file) == described(runs / name / file)
            assert same(load_file(out / file), load_file(runs / name / file))
        else:
            assert (out / file).read_bytes() == (runs / name / file).read_bytes(), file
    parts = {hub.LORA, hub.KOHYA_LORA}
    if name == "full":
        parts = {"model_index.json", "unet", "vae", "text_encoder", "text_encoder_2", "scheduler"}
        parts |= {"tokenizer", "tokenizer_2"}
    assert {path.name for path in out.iterdir()} == parts | {"README.md", "result.json"}
    for part in parts & {"vae", "text_encoder", "text_encoder_2"}:  # never trained
        assert same(tensors(out / part), tensors(checkpoint() / part))


@pytest.mark.parametrize("name, kind", [("full", "unet"), ("lora", "lora")])
def test_the_export_of_an_older_checkpoint_is_the_model_of_its_step(name, kind, runs, tmp_path):
    out = write(tmp_path, runs / name / "checkpoints" / "step_000001", f"--to={kind}")
    first, last = (tensors(runs / name / "unets" / f"step_00000{step}") for step in (1, 2))
    assert same(tensors(out), first) and not same(first, last)
    assert "of 1 steps" in (out / "README.md").read_text()


@pytest.mark.parametrize("name, kind", [("full", "pipeline"), ("lora", "lora"), ("lora", "unet")])
def test_half_precision_is_the_fp32_export_rounded_once(name, kind, runs, tmp_path):
    whole = tensors(write(tmp_path, runs / name, f"--to={kind}"))
    for flag, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        half = tensors(write(tmp_path, runs / name, f"--to={kind}", f"--dtype={flag}"))
        rounded = {k: w.to(dtype) if w.is_floating_point() else w for k, w in whole.items()}
        rounded |= {k: w for k, w in whole.items() if k.startswith(hub.KOHYA_LORA)}  # always fp16
        assert same(half, rounded)
        assert all(half[k].dtype == w.dtype for k, w in rounded.items())


# -------------------------------------------------------------------------------------------------
# It loads, here and in diffusers, and predicts the same.


def test_a_unet_and_a_pipeline_load_everywhere_and_predict_the_same(runs, checkpoint, tmp_path):
    unet = write(tmp_path, runs / "full", "--to=unet")
    pipeline = write(tmp_path, runs / "full")
    expected = predict(loading.load_pipeline(str(runs / "full")))
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(
        checkpoint(), unet=diffusers.UNet2DConditionModel.from_pretrained(unet)
    )
    whole = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    ours = loading.load_any(str(unet), str(checkpoint())), loading.load_any(str(pipeline))
    for found in (theirs, whole, *ours):
        assert torch.equal(predict(found), expected)
    assert not torch.equal(predict(loading.load_pipeline(str(checkpoint()))), expected)


def test_adapters_load_everywhere_and_merged_they_are_base_plus_lora(runs, checkpoint, tmp_path):
    base, run = str(checkpoint()), runs / "lora"
    adapters, merged = write(tmp_path, run), write(tmp_path, run, "--to=pipeline")
    expected = predict(by_hand(loading.load_pipeline(base), adapters, scale=6 / 2))
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
    theirs.load_lora_weights(adapters)
    assert (predict(loading.load_pipeline(base)) - expected).abs().max() > 1e-2
    unet = write(tmp_path, run, "--to=unet")
    ours = [loading.load_any(str(path), base) for path in (adapters, merged, unet)]
    for found in (theirs, *ours, diffusers.DiffusionPipeline.from_pretrained(merged)):
        torch.testing.assert_close(predict(found), expected, rtol=1e-4, atol=1e-5)
    text = [(folder / "README.md").read_text() for folder in (adapters, merged)]
    assert "load_lora_weights" in text[0] and "load_lora_weights" not in text[1]


def test_a_run_that_merged_a_lora_first_is_exported_with_both(runs, checkpoint, tmp_path):
    merged = write(tmp_path, runs / "merged", "--to=pipeline")
    both = by_hand(loading.load_pipeline(str(checkpoint())), runs / "lora", scale=6 / 2)
    expected = predict(by_hand(both, runs / "merged", scale=4 / 4))
    found = predict(loading.load_pipeline(str(merged)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_export_has_what_older_releases_read(runs, tmp_path):
    out = write(tmp_path, runs / "lora", "--to=pipeline", "--dtype=fp16")
    for part in ("tokenizer", "tokenizer_2"):
        assert {"vocab.json", "merges.txt"} <= {path.name for path in (out / part).iterdir()}
    held = load_file(out / "text_encoder" / "model.safetensors")
    assert held and all(name.startswith("text_model.") for name in held)
    assert {w.dtype for w in held.values()} == {torch.float16}


@pytest.mark.parametrize("name", ["full", "merged"])
def test_a_start_that_has_changed_since_the_run_is_said_and_not_refused(
    name, runs, checkpoint, tmp_path, capsys
):
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(runs / name, run)
    shutil.copytree(checkpoint(), base)
    record = json.loads((run / "run.json").read_text())

    def exported(**changes) -> tuple[list[str], str]:
        """Warnings and the model card."""
        (run / "run.json").write_text(json.dumps(record | changes))
        out = write(tmp_path, run, "--to=pipeline")
        said = capsys.readouterr().err.splitlines()
        return [line for line in said if "Warning" in line], (out / "README.md").read_text()

    nothing, card = exported(model=str(base))
    assert not nothing and "Warning" not in card
    weights = load_file(base / "text_encoder_2" / "model.safetensors")
    weights["text_projection.weight"][0, 0] *= 1.5
    save_file(weights, base / "text_encoder_2" / "model.safetensors", metadata={"format": "pt"})
    (said,), card = exported(model=str(base))
    assert said.startswith(f"Warning: {base}, ") and said in card


# -------------------------------------------------------------------------------------------------
# Mistakes.


def refuse(argv: list, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        export.main([str(word) for word in argv])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 1 and lines[0].startswith("training.export: error: ") and lines[0][-1] == "."
    )
    return lines[0]


def test_each_mistake_gets_one_sentence(runs, tmp_path, capsys):
    def copied(name: str, *, without: str) -> Path:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(runs / name, folder)
        lost = folder / without
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
        return folder

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    broken = copied("full", without="samples")
    shard = max((broken / "checkpoints" / "step_000002").glob("*model*"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    other = copied("full", without="samples")  # its model is another one now
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(record | {"model": "tiny", "vae": None}))
    lost = copied("full", without="samples")
    (lost / "run.json").write_text(json.dumps(record | {"model": "no/where/at-all"}))
    mistakes = {
        "no run": ([tmp_path / "nowhere"], ["nowhere", "neither a run's folder nor"]),
        "no checkpoint": ([copied("full", without="checkpoints")], ["has no checkpoint"]),
        "no card": ([copied("full", without="card.json")], ["card.json cannot be read"]),
        "full run": ([runs / "full", "--to=lora"], ["--to lora", "trained the whole UNet"]),
        "full folder": ([runs / "full", f"--out={tmp_path / 'full'}"], ["not empty"]),
        "file": ([runs / "full", f"--out={tmp_path / 'file'}"], ["not empty"]),
        "broken": ([broken], [shard.name, "has changed since it was written"]),
        "other model": ([other], ["does not fit tiny"]),
        "no model": ([lost], ["no/where/at-all"]),
    }
    for name, (argv, words) in mistakes.items():
        sentence = refuse(argv, capsys)
        assert all(word in sentence for word in words), (name, sentence)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    export.main([str(broken / "checkpoints" / "step_000001"), "--to=unet"])  # this one is whole
    assert (broken / "exports" / "step_000001-unet-fp32" / WEIGHTS).exists()


@pytest.mark.parametrize("kind", ["pipeline", "unet", "lora"])
def test_a_full_disk_leaves_nothing_and_the_next_export_is_whole(kind, runs, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [runs / "lora", f"--to={kind}", f"--out={out}"]
    with small_disk(2000):
        sentence = refuse(argv, capsys)
    assert f"--out {out}: was not written" in sentence and not list(tmp_path.iterdir())
    export.main([str(word) for word in argv])
    assert (out / "README.md").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_export_again_deletes_what_a_kill_left_and_leaves_a_whole_one_alone(
    runs, tmp_path, capsys
):
    argv = [runs / "lora", "--to=lora", f"--out={tmp_path / 'out'}"]
    left, other = tmp_path / "out.0a1b2c3d.new", tmp_path / "another.0a1b2c3d.new"
    for folder in (left, other):
        folder.mkdir()
        (folder / "config.json").write_text("{")
    for _ in range(2):
        export.main([str(word) for word in argv])
        assert capsys.readouterr().out == f"Wrote {tmp_path / 'out'}.\n"
        assert not left.exists() and other.exists()  # the other one may be being written
        written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    export.main([str(word) for word in argv])
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    for changed in ([runs / "lora", "--to=lora", "--dtype=fp16"], [runs / "full", "--to=unet"]):
        assert "not empty" in refuse([*changed, f"--out={tmp_path / 'out'}"], capsys)
    os.truncate(tmp_path / "out" / "pytorch_lora_weights.safetensors", 10)
    assert "not empty" in refuse(argv, capsys)


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        export.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "(if not given: fp16" in text and lora.__doc__ not in text
