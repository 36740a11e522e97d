"""Laws of the job: train_inpo.py, plan.py and run.py, on random checkpoints."""

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import distance, metrics, refuse, small_disk, untimed, weights
from launch import Rank, free_port
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data
import loss
import model
import train_inpo
from evaluation import figures
from system import processes
from system.files import ROOT, UserError
from system.hub import LORA
from system.lock import alone, lock
from training import latents, lora, preview, run
from training.flags import parse
from training.folder import (
    check_folder,
    differences,
    result_settings,
    resumes_at,
)
from training.latents import draw_timesteps, generators, stratum
from training.run import Run
from weights import loading, loras


@pytest.fixture(scope="module")
def done(command, tmp_path_factory):
    """The folder of a finished run of one step, for tests that only read it or copy it."""
    out = tmp_path_factory.mktemp("done") / "run"
    train_inpo.main(command(out, steps=1, checkpoint_every=1))
    return out


def exported(out: Path, step: int) -> dict[str, torch.Tensor]:
    folder = out / "unets" / f"step_{step:06d}"
    return diffusers.UNet2DConditionModel.from_pretrained(folder).state_dict()


@pytest.fixture
def run_again(done, tmp_path):
    """tmp_path/"run", a copy of that run."""
    return shutil.copytree(done, tmp_path / "run")


# -------------------------------------------------------------------------------------------------
# Steps and resuming. test_methods.py and test_scale.py compare steps with those written by hand.


def test_accumulating_1x4_equals_4x1(argv, tmp_path, checkpoint):
    # One cell, since the cell of t belongs to the micro-step.
    for micro_batch in (1, 4):
        out = tmp_path / f"micro{micro_batch}"
        train_inpo.main(argv(micro_batch=micro_batch, out=out, inversion_steps=1))
    a, b = weights(tmp_path / "micro1"), weights(tmp_path / "micro4")
    assert distance(a, b) < 1e-3 * distance(a, weights(checkpoint()))
    a, b = metrics(tmp_path / "micro1"), metrics(tmp_path / "micro4")
    # A margin is beta / 2 = 250 times a difference of errors near 1, which fp32 rounds by 1e-7.
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-4)


@pytest.fixture(scope="module")
def stopped(command, tmp_path_factory) -> tuple[Path, Path, dict]:
    """Folders of two runs, undisturbed and stopped at half, and the weights at half. They export
    every 2 steps, and every step from half on."""
    folder = tmp_path_factory.mktemp("stopped")
    whole, halves = folder / "whole", folder / "halves"
    train_inpo.main(command(whole, steps=4, checkpoint_every=2, export_every=2))
    train_inpo.main(command(halves, steps=2, checkpoint_every=2))
    half = weights(halves)
    with open(halves / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # a kill cut this line short
    train_inpo.main(command(halves, steps=4, checkpoint_every=2, export_every=1))
    return whole, halves, half


def test_a_run_that_was_stopped_and_resumed_is_bitwise_the_undisturbed_one(stopped):
    whole, halves, _ = stopped
    assert distance(weights(whole), weights(halves)) == 0
    same, costs = [], []
    for out in (whole, halves):
        same.append(untimed(out))
        costs.append(json.loads((out / "cost.json").read_text()))
        spent = costs[-1].pop("seconds"), costs[-1].pop("device_hours")
        assert spent[0] == pytest.approx(sum(line["seconds"] for line in metrics(out)))
        costs[-1].pop("peak_memory")
    assert same[0] == same[1] and [line["step"] for line in same[0]] == [1, 2, 3, 4]
    assert costs[0] == costs[1]


def test_exports_are_the_unets_at_those_steps(stopped):
    whole, halves, half = stopped
    names = [sorted(path.name for path in (out / "unets").iterdir()) for out in (whole, halves)]
    every = ["step_000002", "step_000003", "step_000004"]  # also of the step that it resumed at
    assert names == [every[::2], every]
    assert all(distance(exported(out, 2), half) == 0 for out in (whole, halves))
    assert distance(exported(whole, 4), half) > 1e-4
    for out in (whole, halves):
        assert distance(exported(out, 4), weights(out)) == 0
        folders = (out / "unets" / "step_000004", out / "unet")
        configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
        shapes = [{k: v for k, v in config.items() if k[0] != "_"} for config in configs]
        assert shapes[0] == shapes[1]


def test_a_run_says_on_resume_that_its_code_is_not_the_one_it_began_with(
    argv, run_again, monkeypatch, capsys
):
    began = processes.code_version()
    for steps, code in ((2, began), (3, "another"), (4, began)):
        monkeypatch.setattr(run, "code_version", lambda code=code: code)
        train_inpo.main(argv(steps=steps, checkpoint_every=1))
        said = [line for line in capsys.readouterr().out.splitlines() if "The code" in line]
        words = f"The code has changed since this run started ({began} there, {code} now)."
        assert said == ([] if code == began else [words])


def test_a_run_that_was_killed_while_it_wrote_the_pipeline_writes_it_again(argv, run_again, done):
    for file in ("unet/diffusion_pytorch_model.safetensors", "cost.json", "README.md"):
        (run_again / file).unlink()
    train_inpo.main(argv(steps=1, checkpoint_every=1))
    assert distance(weights(run_again), weights(done)) == 0
    assert (run_again / "cost.json").exists()


def test_a_finished_run_is_left_alone(argv, run_again, capsys):
    before = (run_again / "model_index.json").stat().st_mtime_ns
    with alone(run_again):  # it does not even ask for the folder
        train_inpo.main(argv(steps=1))
    assert "has finished" in capsys.readouterr().out
    assert (run_again / "model_index.json").stat().st_mtime_ns == before


# -------------------------------------------------------------------------------------------------
# Randomness.


def test_each_cycle_of_micro_steps_visits_every_cell_once():
    for cycle in range(20):
        cells = [stratum(3, cycle * 10 + i, 10) for i in range(10)]
        assert sorted(cells) == list(range(10))
    orders = {tuple(stratum(3, c * 10 + i, 10) for i in range(10)) for c in range(20)}
    assert len(orders) == 20


def test_the_marginal_of_t_is_uniform():
    t = draw_timesteps(0, range(10_000), 8, 10, 1000)
    assert t.min() == 0 and t.max() == 999
    counts = torch.bincount(t // 20, minlength=50).float()  # 50 bins, 200 expected in each
    chi2 = ((counts - 200) ** 2 / 200).sum().item()
    assert 25 < chi2 < 86  # 0.1 % to 99.9 % of chi-squared with 49 degrees of freedom, or fewer
    even = torch.bincount(t // 100, minlength=10)
    assert (even == 1000).all()  # cells are visited equally often, exactly


def test_t_and_noise_follow_from_seed_and_pair_number_alone():
    together = draw_timesteps(5, range(4, 8), 4, 10, 1000)
    alone = [draw_timesteps(5, [n], 4, 10, 1000) for n in range(4, 8)]
    assert torch.equal(together, torch.cat(alone))
    assert (together // 100 == stratum(5, 1, 10)).all()
    assert len(set(together.tolist())) > 1

    def draw(generator):
        return torch.randn(3, generator=generator)

    both = [draw(g) for g in generators(5, [8, 9])]  # winners 8, 9, losers 8, 9
    first, second = ([draw(g) for g in generators(5, [n])] for n in (8, 9))
    for a, b in zip(both, [first[0], second[0], first[1], second[1]], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(both[0], both[2])


def test_all_ranks_take_the_same_number_of_unet_calls():
    # Ranks 0 and 1 of 2 draw different t from one cell, in every micro-step.
    for micro_step in range(30):
        cell = stratum(0, micro_step, 10)
        t = [
            draw_timesteps(0, data.pair_numbers(micro_step, 0, r, 2, 4, 1), 8, 10, 1000)
            for r in (0, 1)
        ]
        assert (torch.stack(t) // 100 == cell).all() and not torch.equal(*t)


# -------------------------------------------------------------------------------------------------
# The loop.


def test_winners_come_first_from_file_to_loss(argv, monkeypatch):
    """Every winner in the file is light and every loser dark, whatever its label's side."""
    seen = []
    true_encode, true_loss = model.encode_images, loss.dpo_loss

    def encode(pipeline, pixels, generator=None):
        seen.append(pixels.float().mean(dim=(1, 2, 3)) / 127.5 - 1)
        encoded = true_encode(pipeline, pixels, generator)
        return encoded * 0 + seen[-1][:, None, None, None]  # the latent says who it is

    def invert(eps_fn, x0, t, abar, *path):
        assert torch.equal(t[: len(t) // 2], t[len(t) // 2 :])  # shared by the pair
        return x0, x0

    def watched(err, err_ref, beta):
        winner, loser = err.chunk(2)  # |eps - x0|^2 with a bright or dark constant x0
        order.append((winner.detach(), loser.detach()))
        return true_loss(err, err_ref, beta)

    def predict(unet, x, *_, **__):
        return x * 0 + 1 + 0 * sum(p.sum() for p in unet.parameters())

    order = []
    monkeypatch.setattr(model, "encode_images", encode)
    monkeypatch.setattr(model, "predict_noise", predict)
    monkeypatch.setattr(latents, "ddim_invert", invert)
    monkeypatch.setattr(loss, "dpo_loss", watched)
    monkeypatch.setattr(train_inpo, "checked", lambda batches, *_: batches)
    train_inpo.main(argv(steps=4))
    assert len(seen) == 8
    for pixels, (winner, loser) in zip(seen, order, strict=True):
        assert (pixels[:2] > 0.5).all() and (pixels[2:] < -0.5).all()
        assert (winner < 0.5).all() and (loser > 2).all()  # (1 - 1)^2 and (1 + 1)^2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_both_architectures_and_prediction_types_train(
    kind, prediction, argv, tmp_path, checkpoint, pairs, ds_config, monkeypatch
):
    """On one pair, always at the same t and with the same noise, the loss falls at every step."""
    folder, out, one = checkpoint(kind, prediction), tmp_path / "run", tmp_path / "one.parquet"
    pq.write_table(pq.read_table(pairs).slice(0, 1), one)
    monkeypatch.setattr(train_inpo, "draw_timesteps", lambda *_: torch.tensor([450]))
    same = [torch.Generator() for _ in range(2)]
    monkeypatch.setattr(train_inpo, "generators", lambda *_: [g.manual_seed(0) for g in same])
    adamw = {"type": "AdamW", "params": {"torch_adam": True}}
    train_inpo.main(
        [
            *argv(model=folder, data=one, batch=1, micro_batch=1, caption_dropout=0, steps=3),
            *("--no-flip", "--lr=1e-5", f"--ds-config={ds_config(optimizer=adamw)}"),
        ]
    )
    lines = metrics(out)
    losses = [line["loss"] for line in lines]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert lines[0]["implicit_accuracy"] == 0.5 and lines[0]["margin"] == 0
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert lines[-1]["implicit_accuracy"] == 1 and distance(weights(out), weights(folder)) > 0
    index, start = (json.loads((x / "model_index.json").read_text()) for x in (out, folder))
    assert index["_class_name"] == start["_class_name"]
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == prediction


def test_the_saved_pipeline_samples_what_the_trained_one_did(argv, tmp_path, monkeypatch):
    drawn, finish = [], Run.finish

    def spy(self, engine, plan):
        pipeline = lora.load_start(self.args, torch.float32)
        pipeline.register_modules(unet=engine.module)
        drawn.extend(model.sample(pipeline, ["a red circle"] * 2, [3, 4], 3, 2.0))
        finish(self, engine, plan)

    monkeypatch.setattr(Run, "finish", spy)
    train_inpo.main(argv())
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    again = pipeline(
        ["a red circle"] * 2,
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    ).images
    for a, b in zip(drawn, again, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_unet_flag_sets_start_and_reference(argv, tmp_path, checkpoint):
    other = tmp_path / "other"
    shutil.copytree(checkpoint() / "unet", other)
    unet = diffusers.UNet2DConditionModel.from_pretrained(other)
    with torch.no_grad():
        unet.conv_out.bias += 1
    unet.save_pretrained(other)
    train_inpo.main(argv(unet=other, lr=1e-6))
    assert distance(weights(tmp_path / "run"), unet.state_dict()) < 1e-3
    assert metrics(tmp_path / "run")[0]["margin"] == 0  # the reference started there, too


def test_a_run_leaves_metrics_pictures_checkpoints_curves_and_a_card(argv, tmp_path, monkeypatch):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("a red circle\na blue circle\n")
    monkeypatch.setattr(run, "figures", figures)  # launch.py put something faster there
    monkeypatch.setattr(preview, "STEPS", 2)
    how = {"sample_every": 2, "checkpoint_every": 1, "sample_prompts": prompts}
    train_inpo.main(argv(steps=4, warmup=3, lr=3e-4, **how))
    assert [line["lr"] for line in metrics(out)] == pytest.approx([1e-4, 2e-4, 3e-4, 3e-4])
    keys = {"loss", "implicit_accuracy", "margin", "err_winner", "err_ref_loser", "grad_norm"}
    assert all(keys <= line.keys() for line in metrics(out))
    names = {path.name for path in (out / "samples").glob("step_*")}
    assert names == {"step_000000.png", "step_000002.png", "step_000004.png"}
    assert len(list((out / "checkpoints").glob("step_*"))) == 2  # the newest two
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert events.Scalars("train/loss")[2].value == pytest.approx(metrics(out)[2]["loss"])
    assert (out / "curves.png").stat().st_size > 1000
    page = (out / "samples.html").read_text()
    assert "samples/model_000004_01.png" in page and '"curves":"curves.png"' in page
    card = (out / "README.md").read_text()
    assert all(words in card for words in ("| beta | 500.0 |", "24 pairs", "2503.18454"))


# -------------------------------------------------------------------------------------------------
# LoRA, through the job.


def test_a_lora_is_trained_on_or_merged_before_training(argv, tmp_path, checkpoint):
    """Continued: its adapters move on, the reference lacks them. Merged: the reference has them."""
    first, base = tmp_path / "first", checkpoint()
    train_inpo.main(argv(out=first, lora_rank=4))
    assert metrics(first)[0]["margin"] == 0  # B = 0: the start is the reference
    on, merged = tmp_path / "on", tmp_path / "merged"
    train_inpo.main(argv(out=on, lora=first, steps=1, lr=1e-9))
    train_inpo.main(argv(out=merged, lora=first, lora_start="merge", lora_rank=2, steps=1, lr=1e-9))
    assert metrics(on)[0]["margin"] != 0 and metrics(merged)[0]["margin"] == 0
    errors = [metrics(out)[0]["err_winner"] for out in (on, merged, first)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4) != pytest.approx(errors[2], rel=1e-4)

    def unet(*adapters) -> dict:
        pipeline = loading.load_pipeline(str(base))
        for path in adapters:
            loras.fuse_lora(pipeline, str(path))
        return pipeline.unet.state_dict()

    moved = distance(unet(first), unet())
    assert moved > 1e-4 and distance(unet(on), unet(first)) < 1e-3 * moved
    assert distance(unet(first, merged), unet(first)) < 1e-3 * moved  # written: the new ones alone
    assert distance(unet(merged), unet()) < 1e-3 * moved
    for out, words in ((on, "LoRA adapters"), (merged, f"with the LoRA `{first}` merged")):
        assert words in (out / "README.md").read_text()
        assert not (out / "unet").exists()


# -------------------------------------------------------------------------------------------------
# Before training: the plan, and one sentence for each mistake.


def test_dry_run_prints_the_plan_and_writes_nothing(argv, tmp_path, capsys):
    train_inpo.main([*argv(steps=50, batch=8), "--dry-run"])
    text = capsys.readouterr().out
    for words in (
        "24 pairs without ties",
        "the run sees 400",
        "8 pairs = 2 x 1 rank(s) x 4 accumulated",
        "5.5 to invert + 1 reference + 3 to train; 7,600 in all",
        "ZeRO-2",
    ):
        assert words in text
    assert not (tmp_path / "run").exists()


def test_the_published_recipe_is_the_default():
    sdxl, sd15 = parse("", []), parse("", ["--model=sd15"])
    for args, beta in ((sdxl, 5000), (sd15, 2000)):
        assert (args.steps, args.batch, args.lr, args.warmup) == (400, 1024, 1.024e-5, 200)
        assert (args.beta, args.inversion_steps, args.eta, args.caption_dropout) == (
            beta,
            10,
            0.1,
            0.2,
        )
    assert sdxl.vae == "madebyollin/sdxl-vae-fp16-fix" and sd15.vae is None
    by_id = parse("", ["--model=stabilityai/stable-diffusion-xl-base-1.0"])
    assert by_id.vae == sdxl.vae  # the same model by its hub id


def test_help_is_grouped_and_shows_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train_inpo.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for group in ("model:", "data:", "method:", "optimization:", "run:"):
        assert f"\n{group}\n" in text
    for default in ("5000.0", "1.024e-05", "1024", "yuvalkirstain/pickapic_v2", "0.2"):
        assert re.search(rf"\(default:\s+{re.escape(default)}\)", text), default
    assert "defaults of --model" in text and str(ROOT) not in text


def table(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def mistakes(tmp_path, argv, ds_config, checkpoint):
    """name -> (flags, words that the sentence must have)."""
    rows = {"jpg_0": [b"x"], "jpg_1": [b"x"], "caption": ["a"]}
    no_label = table(tmp_path / "no_label.parquet", **rows)
    ties = table(tmp_path / "ties.parquet", **rows, label_0=[0.5])
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 but no more")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    no_json, auto = tmp_path / "no.json", tmp_path / "auto.json"
    no_json.write_text("{bf16: on}")
    auto.write_text('{"bf16": {"enabled": "auto"}}')
    offload = tmp_path / "offload.json"
    offload.write_text(
        '{"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}'
    )
    return {
        "unknown model": ({"model": "sdlx"}, ["sdlx", "sdxl, sd15, tiny"]),
        "folder that is no pipeline": ({"model": tmp_path / "empty"}, ["model_index.json"]),
        "no such unet": ({"unet": tmp_path / "empty"}, ["empty", "unet"]),
        "missing column": ({"data": no_label}, ["no_label.parquet", "label_0"]),
        "unreadable parquet": ({"data": broken}, ["broken.parquet"]),
        "only ties": ({"data": ties}, ["ties"]),
        "no such data": ({"data": tmp_path / "nowhere.parquet"}, ["nowhere.parquet"]),
        "batch not divisible": ({"batch": 5}, ["--batch 5", "--micro-batch 2"]),
        "too many steps": ({"inversion_steps": 1001}, ["--inversion-steps 1001", "1000"]),
        "steps that do not divide": ({"inversion_steps": 7}, ["--inversion-steps 7", "1000"]),
        "no inversion steps": ({"inversion_steps": 0}, ["--inversion-steps 0"]),
        "negative beta": ({"beta": -1}, ["--beta -1"]),
        "beta that is no number": ({"beta": "nan"}, ["--beta", "'nan' is not a finite"]),
        "eta above 1": ({"eta": 1.5}, ["--eta 1.5"]),
        "odd resolution": ({"resolution": 15}, ["--resolution 15", "2"]),
        "folder of something else": ({"out": tmp_path / "full"}, ["full", "empty folder"]),
        "ds_config that is no JSON": ({"ds_config": no_json}, ["no.json", "JSON"]),
        "ds_config with auto": ({"ds_config": auto}, ["auto.json", "bf16.enabled"]),
        "ZeRO-1 with offload": ({"ds_config": offload}, ["offload.json", "ZeRO-2 or ZeRO-3"]),
        "no ds_config": ({"ds_config": tmp_path / "no.where"}, ["no.where"]),
        "no prompts file": ({"sample_prompts": tmp_path / "no.txt"}, ["no.txt"]),
    }  # fmt: skip


def test_each_mistake_gets_one_sentence_and_exit_code_2(mistakes, argv, tmp_path, capsys):
    for name, (flags, words) in mistakes.items():
        sentence = refuse(argv(**flags), capsys)
        assert all(word in sentence for word in words), (name, sentence)
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"


def test_missing_weights_get_one_sentence(argv, checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint(), tmp_path / "copy")
    (tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "copy" in refuse(argv(model=tmp_path / "copy"), capsys)


def test_a_folder_with_another_run_is_refused_with_the_differing_keys(argv, done, capsys):
    sentence = refuse(argv(out=done, steps=1, beta=501, seed=3), capsys)
    assert "beta: 500.0 there, 501.0 now" in sentence and "seed: 0 there, 3 now" in sentence
    assert "lr" not in sentence


def test_a_run_resumes_with_any_shipped_configuration_of_its_precision():
    files = [ROOT / "ds_config.json", *(ROOT / "configs").glob("*.json")]
    configs = {file.stem: {"ds_config": json.loads(file.read_text())} for file in files}
    kinds = {name: result_settings(asked).keys() for name, asked in configs.items()}
    for a, b in itertools.permutations(configs, 2):
        differ = differences(configs[a], configs[b])
        assert (differ == "") == (kinds[a] == kinds[b]), (a, b, differ)
    assert sum(keys == kinds["ds_config"] for keys in kinds.values()) >= 5
    assert result_settings(result_settings(configs["zero3"])) == result_settings(configs["zero3"])

    def optimizer(kind: str, **params) -> dict:
        return {"ds_config": {"optimizer": {"type": kind, "params": params}}}

    plain = optimizer("AdamW", lr=1)
    for other in ({"fused": True}, {"foreach": False}, {"torch_adam": True, "adam_w_mode": False}):
        assert differences(plain, optimizer("AdamW", lr=1, **other)) == ""
    for other in (optimizer("AdamW", lr=1, eps=1), optimizer("Adam", lr=1), optimizer("AdamW")):
        assert differences(plain, other).startswith("ds_config.optimizer: {")
    decay = optimizer("Adam", adam_w_mode=True), optimizer("Adam", adam_w_mode=False)
    assert differences(*decay)  # for Adam it says where the decay goes


# -------------------------------------------------------------------------------------------------
# The folder.


def test_a_full_disk_at_the_start_is_one_sentence_that_names_the_file_and_harms_nothing(
    argv, pairs, tmp_path, capsys
):
    command, out = argv(steps=1), tmp_path / "run"
    data.read_pairs(str(pairs), "train")  # makes the cache of the data
    with small_disk(100):
        sentence = refuse(command, capsys)
    assert f"{out / 'run.json'} cannot be written (File too large)" in sentence
    assert [path.name for path in out.iterdir()] == [".lock"]
    for name in ("samples", "checkpoints"):
        (out / name).mkdir()
    (out / "run.json.0f0f0f0f.new").write_text("{")
    train_inpo.main(command)
    assert (out / "README.md").exists() and not list(out.rglob("*.new"))


def test_a_folder_is_free_if_it_has_no_more_than_empty_leavings_of_a_start(tmp_path):
    (tmp_path / "samples").mkdir()
    check_folder(tmp_path, {})
    for taken in ("samples/1.png", "checkpoints", "notes.txt", ".locked"):
        (tmp_path / taken).write_text("")
        with pytest.raises(UserError, match="holds files of something else"):
            check_folder(tmp_path, {})
        (tmp_path / taken).unlink()
    check_folder(tmp_path, {})


def test_a_run_resumes_at_its_newest_complete_checkpoint(tmp_path):
    assert resumes_at(tmp_path) == 0
    for name in ("step_000002", "step_000010", "step_000011.broken", "step_000012.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert resumes_at(tmp_path) == 10


def test_a_second_job_in_the_folder_is_refused_until_the_first_ends(argv, tmp_path, capsys):
    out = tmp_path / "run"
    with alone(out):
        assert f"--out {out}: another job is writing there" in refuse(argv(steps=1), capsys)
        assert [path.name for path in out.iterdir()] == [".lock"]
        train_inpo.main([*argv(steps=1), "--dry-run"])  # writes nothing
    with alone(out):
        pass


def test_the_lock_ends_with_its_process_however_it_ends_and_not_with_its_children(tmp_path):
    code = "import subprocess; from pathlib import Path; from system.lock import lock;"
    code += "descriptor = lock(Path('.'));"
    code += "print(subprocess.Popen(['sleep', '60'], close_fds=False).pid, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, **pipes)
    worker = int(next(line for line in holder.stdout if line.strip().isdigit()))
    try:
        with pytest.raises(UserError, match="another job"):
            lock(tmp_path)
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives
        os.close(lock(tmp_path))
    finally:
        os.kill(worker, signal.SIGKILL)


def test_where_the_file_system_has_no_locks_a_run_starts(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    os.close(lock(tmp_path))


def through_the_launcher(argv: list[str]) -> subprocess.CompletedProcess:
    """The command on two ranks that DeepSpeed's launcher starts."""
    launcher = Path(sys.executable).with_name("deepspeed")
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [str(launcher), "--num_gpus", "2", "--master_port", free_port()]
    command += [str(ROOT / "train_inpo.py"), *argv]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=300)


def test_the_launcher_trains_a_step_on_two_ranks(argv, tmp_path, done, checkpoint):
    child = through_the_launcher(argv(steps=1, micro_batch=1))
    assert child.returncode == 0, child.stderr[-3000:]
    assert "4 pairs = 1 x 2 rank(s) x 2 accumulated" in child.stdout
    moved = distance(weights(done), weights(checkpoint()))
    assert distance(weights(tmp_path / "run"), weights(done)) < 1e-3 * moved


@pytest.mark.slow
def test_the_launcher_passes_exit_code_2_on(argv):
    child = through_the_launcher(argv(batch=5))
    assert child.returncode == 2
    assert child.stderr.count("train_inpo.py: error: --batch 5") == 1  # rank 0 alone speaks


def test_a_node_that_cannot_join_says_why_on_that_node(argv):
    """Rank 1, the first of its own node, was given another command than rank 0."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    place["LOCAL_RANK"] = "0"
    ranks = [Rank("train_inpo.py", argv(seed=n), place | {"RANK": str(n)}) for n in (0, 1)]
    said = ranks[1].communicate()[1]
    assert ranks[1].returncode == 2 and "Traceback" not in said
    assert "train_inpo.py: error: rank 1" in said and "same command on every node" in said


# -------------------------------------------------------------------------------------------------
# Half precision.


def test_a_half_precision_run_begins_with_all_digits_of_the_start(
    argv, tmp_path, half, checkpoint, monkeypatch
):
    """At a learning rate of nothing the result is the start, also of a resumed run, and policy and
    reference are one: also where a LoRA was merged into both, and each weight is a sum."""
    adapters, start, engines = tmp_path / "lora", weights(checkpoint()), []
    start_engine = train_inpo.start_engine
    train_inpo.main(argv(out=adapters, lora_rank=4))
    pipeline = loading.load_pipeline(str(checkpoint()))
    loras.fuse_lora(pipeline, str(adapters))
    sums, merge = pipeline.unet.state_dict(), {"lora": adapters, "lora_start": "merge"}
    assert distance(sums, start) > 1e-4

    def spy(*given):
        engines.append(start_engine(*given))
        return engines[-1]

    monkeypatch.setattr(train_inpo, "start_engine", spy)
    for name, steps, expected, flags in (
        ("full", 1, start, {}),
        ("merged", 1, sums, merge),
        ("merged", 2, sums, merge),
    ):
        out = tmp_path / name
        train_inpo.main(argv(out=out, lr=1e-12, steps=steps, checkpoint_every=1, **flags))
        assert distance(weights(out), expected) < 1e-8, name
        engine, reference = engines.pop()
        assert distance(engine.module.state_dict(), reference.state_dict()) < 1e-9, name
    train_inpo.main(argv(out=tmp_path / "new", lr=1e-12, steps=1, lora_rank=4))
    asked = Namespace(**json.loads((tmp_path / "new" / "run.json").read_text()))
    drawn = lora.trainable(lora.load_start(asked, torch.float32).unet)
    drawn = {f"unet.{name.replace('.default.', '.')}": weight for name, weight in drawn.items()}
    assert distance(load_file(tmp_path / "new" / LORA), drawn) < 1e-8


def test_bf16_trains_with_fp32_errors_and_saves_the_fp32_master_weights(
    argv, tmp_path, half, checkpoint
):
    train_inpo.main(argv(steps=3, warmup=1, lr=1e-4))
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and lines[0]["margin"] == 0
    assert all(np.isfinite(line["loss"]) for line in lines)
    saved = weights(tmp_path / "run")
    rounded = {name: value.bfloat16().float() for name, value in saved.items()}
    assert distance(saved, rounded) > 0  # more digits than bf16 holds
    assert 0 < distance(saved, weights(checkpoint())) < 1e-2
