"""The check before the first step: does the UNet predict what its model says?"""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import refusal, refuse
from torch.nn.functional import mse_loss

import model
import toy
import train_inpo
from system import hub
from training import prediction
from weights import saving
from weights.loading import load_pipeline


@pytest.fixture(scope="module")
def shown():
    """(the tiny pipeline, abar, x0 of eight of its pictures, noise, cond)."""
    pipeline, rng = load_pipeline("tiny"), np.random.default_rng(5)
    captions = toy.prompts()[::5][:8]
    pictures = [np.array(toy.draw(caption, rng)) for caption in captions]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    draw = [torch.Generator().manual_seed(i) for i in range(8)]
    x0 = model.encode_images(pipeline, pixels, draw)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(9))
    cond = model.encode_prompts(pipeline, captions, 64)
    return pipeline, model.alphas_cumprod(pipeline), x0, noise, cond


def test_only_the_right_reading_of_the_tiny_model_beats_no_prediction(shown):
    pipeline, abar, x0, noise, cond = shown
    epsilon, v = prediction.errors(pipeline.unet, x0, noise, cond, abar)
    assert epsilon < 0.5 and v > 1.2

    def as_v(x, t, **given):  # the model that predicts v, and so the same pictures
        signal = abar[t].reshape(-1, 1, 1, 1)
        eps = pipeline.unet(x, t, **given)[0]
        return ((eps - (1 - signal).sqrt() * x) / signal.sqrt(),)

    wrong, right = prediction.errors(as_v, x0, noise, cond, abar)
    assert right == pytest.approx(epsilon.item(), rel=1e-4) and wrong > 10


def test_errors_of_a_perfect_model_are_those_in_the_docstring(shown):
    pipeline, abar, x0, noise, cond = shown
    faint = torch.full_like(abar, 1e-4)
    x0, noise = torch.ones(2, 4, 8, 8), torch.ones(2, 4, 8, 8)
    noise[..., ::2] = -1  # no part of it lies along x0
    right, wrong = prediction.errors(lambda *_, **__: (noise,), x0, noise, cond, faint)
    assert right < 1e-4 and wrong == pytest.approx(2, abs=0.03)
    v = 1e-2 * noise - (1 - 1e-4) ** 0.5 * x0
    wrong, right = prediction.errors(lambda *_, **__: (v,), x0, noise, cond, faint)
    assert right < 1e-4 and wrong > 1e3


JUDGED = {  # errors, the declared type, --prediction-type: how it ends, words of the sentence
    "right": ((0.2, 1.5), "epsilon", None, "quiet", ""),
    "wrong": ((30.0, 0.3), "epsilon", None, "refused", "give --prediction-type v_prediction, or"),
    "insists": ((1.5, 0.3), "epsilon", "epsilon", "warned", "as v_prediction, which it probably"),
    "neither": ((1.2, 3.0), "epsilon", None, "warned", "untrained, damaged, or of another VAE"),
    "nan": ((float("nan"),) * 2, "epsilon", None, "warned", "untrained, damaged"),
}


@pytest.mark.parametrize("case", JUDGED)
def test_what_is_said_of_the_errors(case, capsys):
    values, declared, insisted, end, words = JUDGED[case]
    args = argparse.Namespace(model="mine", unet=None, prediction_type=insisted)
    found = dict(zip(prediction.TYPES, values, strict=True))
    if end == "refused":
        assert words in refusal(prediction.judge, args, found, declared)
        return
    prediction.judge(args, found, declared)
    said = capsys.readouterr().err
    assert words in said and said.count("Warning: ") == (end == "warned")


@pytest.mark.slow
def test_a_model_that_was_fine_tuned_to_v_is_recognized(shown, argv, tmp_path, capsys):
    pipeline, abar, *_ = shown
    rng, drawn = np.random.default_rng(6), torch.Generator().manual_seed(6)
    unet = load_pipeline("tiny").unet.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    for _ in range(150):
        captions = list(rng.choice(toy.prompts(), 8))
        pixels = np.stack([np.array(toy.draw(caption, rng)) for caption in captions])
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        x0 = model.encode_images(pipeline, pixels, [drawn] * 8)
        noise = torch.randn(x0.shape, generator=drawn)
        t = torch.randint(0, 1000, (8,), generator=drawn)
        signal = abar[t].reshape(-1, 1, 1, 1)
        xt = signal.sqrt() * x0 + (1 - signal).sqrt() * noise
        cond = model.encode_prompts(pipeline, captions, 64)
        v = signal.sqrt() * noise - (1 - signal).sqrt() * x0
        mse_loss(unet(xt, t, **cond, return_dict=False)[0], v).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = shutil.copytree(hub.PRESETS["tiny"], tmp_path / "v")
    shutil.rmtree(folder / "unet")
    saving.save_unet(dict(unet.config), unet.state_dict(), folder / "unet")
    toy.write_pairs(tmp_path / "pairs.parquet", 32)

    def train(**flags) -> list[str]:
        given = {"model": folder, "data": tmp_path / "pairs.parquet", "steps": 1} | flags
        return argv(out=tmp_path / f"run-{len(list(tmp_path.iterdir()))}", **given)

    assert "give --prediction-type v_prediction" in refuse(train(), capsys)
    train_inpo.main(train(prediction_type="v_prediction"))
    assert "no prediction would be" not in capsys.readouterr().err
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    train_inpo.main(train())
    assert "no prediction would be" not in capsys.readouterr().err
    train_inpo.main(train(prediction_type="epsilon"))
    assert "which it probably is" in capsys.readouterr().err
