"""Laws of --base-weights: training/quantized.py, on random checkpoints."""

import json
import sys

import diffusers
import pytest
import torch
from conftest import distance, metrics, refuse, untimed, weights
from launch import launch
from safetensors.torch import load_file
from test_lora import adapted, fresh, predict

import train_inpo
from system.hub import LORA
from training import budget, export, lora, quantized
from weights import loading

both = pytest.mark.parametrize("kind", ["int8", "nf4"])
# Of QLoRA (2305.14314), appendix E.
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0]
)  # fmt: skip


FP32 = torch.float32, 4


@pytest.fixture(autouse=True)
def library(request):
    if (
        getattr(request.node, "callspec", None)
        and request.node.callspec.params.get("kind") == "nf4"
    ):
        pytest.importorskip("bitsandbytes")


def by_hand(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The matrix that few bits hold."""
    if kind == "int8":
        scale = weight.abs().max(dim=1, keepdim=True).values / 127
        return torch.round(weight / scale) * scale
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().max(dim=1, keepdim=True).values
    nearest = (blocks / largest)[..., None].sub(NF4).abs().argmin(-1)
    return (NF4[nearest] * largest).reshape(weight.shape)


def rounded(unet: diffusers.UNet2DConditionModel, kind: str) -> dict[str, torch.Tensor]:
    """The weights with those of linear layers in attention blocks as few bits hold them."""
    state = unet.state_dict()
    names = [n for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear)]
    names = [f"{name}.weight" for name in names if ".attentions." in name]
    assert len(names) > 40
    return state | {name: by_hand(state[name], kind) for name in names}


@pytest.fixture
def rounded_base(checkpoint, tmp_path):
    """rounded_base(kind) -> the checkpoint, whose UNet has been rounded by hand."""

    def write(kind):
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(checkpoint())
        pipeline.unet.load_state_dict(rounded(pipeline.unet, kind))
        pipeline.save_pretrained(tmp_path / "rounded")
        return tmp_path / "rounded"

    return write


# -------------------------------------------------------------------------------------------------
# The layers.


@both
def test_policy_and_reference_are_adapters_on_and_off_a_base_in_few_bits(checkpoint, kind):
    unet, base = adapted(checkpoint()), fresh(checkpoint())
    change = {name: weight.clone() for name, weight in lora.trainable(unet).items()}
    quantized.quantize(unet, kind)
    assert lora.trainable(unet).keys() == change.keys()
    assert all("lora_" in name for name in unet.state_dict() if ".attn1.to_q." in name)
    base.load_state_dict(rounded(base, kind))
    expected = predict(base)
    torch.testing.assert_close(predict(lora.AdapterOff(unet)), expected, rtol=1e-4, atol=1e-5)
    plain = adapted(checkpoint())
    plain.load_state_dict(rounded_under_adapters(plain, kind))
    torch.testing.assert_close(predict(unet), predict(plain), rtol=1e-4, atol=1e-5)
    assert (predict(unet) - expected).abs().max() > 0.1


def rounded_under_adapters(unet, kind):
    state, base = unet.state_dict(), {}
    for name, weight in state.items():
        if ".attentions." in name and weight.ndim == 2 and "lora_" not in name:
            base[name] = by_hand(weight, kind)
    return state | base


@both
def test_gradients_are_those_of_the_rounded_weights_and_none_of_them_is_kept(kind):
    layer = torch.nn.Linear(64, 96).requires_grad_(False)
    few, x = quantized.QuantizedLinear(layer, kind), torch.randn(2, 5, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        y = few(x)
    weight, grad = by_hand(layer.weight, kind), torch.randn(y.shape)
    y.backward(grad)
    torch.testing.assert_close(y, x @ weight.T + layer.bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, grad @ weight, rtol=1e-5, atol=1e-5)
    assert not kept and not few.state_dict().keys() - {"bias"}


@both
def test_an_engines_rounding_of_its_module_leaves_codes_and_scales(kind):
    layer = torch.nn.Linear(64, 96).requires_grad_(False)
    few = quantized.QuantizedLinear(layer, kind)
    before = few.weight_in(torch.float32)
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.float):
        assert torch.equal(cast(few).weight_in(torch.float32), before)
    assert few.bfloat16()(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@both
def test_the_bytes_that_the_plan_counts_are_those_that_are_saved(checkpoint, kind):
    unet = adapted(checkpoint())
    said = quantized.saved_bytes(unet, kind)

    def size(unet):
        return sum(x.nbytes for x in [*unet.parameters(), *unet.buffers()])

    before = size(unet)
    quantized.quantize(unet, kind)
    assert before - size(unet) == said > before / 5
    config = json.dumps({**unet.config}, default=str)
    counted = budget._counted(config, torch.float32, 4, "all", True, kind)
    assert counted[-1] == said and budget._counted(config, *FP32, "all", True, None)[-1] == 0


# -------------------------------------------------------------------------------------------------
# Runs.


@pytest.mark.parametrize(
    "kind, stage", [("int8", 1), pytest.param("nf4", 2, marks=pytest.mark.slow)]
)
def test_a_run_is_that_on_rounded_weights_and_its_lora_is_for_the_models_own(
    argv, checkpoint, ds_config, rounded_base, tmp_path, kind, stage
):
    run, plain = tmp_path / "run", tmp_path / "plain"
    flags = {"lora_rank": 4, "lora_targets": "all", "ds_config": ds_config(stage), "lr": 1e-2}
    first = argv(base_weights=kind, checkpoint_every=1, steps=1, **flags)
    train_inpo.main(first)
    train_inpo.main(argv(base_weights=kind, checkpoint_every=1, steps=3, **flags))  # resumes
    train_inpo.main(argv(out=plain, model=rounded_base(kind), steps=3, **flags))
    for found, expected in zip(untimed(run), untimed(plain), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    found, expected = (load_file(out / LORA) for out in (run, plain))
    assert distance(found, expected) < 1e-5 < 1e-4 < max(w.abs().max() for w in expected.values())
    assert metrics(run)[0]["margin"] == 0  # policy and reference see the same base

    export.main([str(run), "--to=pipeline", f"--out={tmp_path / 'merged'}"])
    merged = loading.load_any(str(run), str(checkpoint())).unet.state_dict()
    assert distance(weights(tmp_path / "merged"), merged) < 1e-6
    assert 1e-5 < distance(merged, weights(checkpoint()))


@pytest.mark.slow
def test_two_ranks_train_what_one_does_in_half_precision_too(argv, ds_config, tmp_path, half):
    flags = {"lora_rank": 4, "base_weights": "int8", "steps": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    for stage in (1, 2):
        argument = {"ds_config": ds_config(stage), **flags}
        launch(argv(out=two / str(stage), micro_batch=1, **argument), 2)
        launch(argv(out=one / str(stage), **argument), 1)
        found, expected = (load_file(out / str(stage) / LORA) for out in (two, one))
        assert distance(found, expected) < 1e-5
    train_inpo.main(argv(out=tmp_path / "half", **flags))
    found = load_file(tmp_path / "half" / LORA)
    assert 0 < distance(found, expected) < 1e-2


@pytest.mark.parametrize(
    "flags, words",
    [
        ({}, "has a meaning for adapters alone"),
        ({"lora": "x", "lora_start": "merge"}, "has a meaning for adapters alone"),
        ({"lora_rank": 2, "compile": ""}, "was not tried with --compile"),
        ({"lora_rank": 2, "ds_config": 3}, "ZeRO-3 of"),
    ],
)
def test_what_it_does_not_go_with_is_refused(argv, ds_config, capsys, flags, words, checkpoint):
    if "lora" in flags:
        flags = flags | {"lora": checkpoint()}
    if "ds_config" in flags:
        flags = flags | {"ds_config": ds_config(3)}
    command = [word.removesuffix("=") for word in argv(base_weights="int8", **flags)]
    sentence = refuse([*command, "--dry-run"], capsys)
    assert "--base-weights int8: " in sentence and words in sentence


def test_without_the_library_a_sentence_says_how_to_get_it(argv, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    sentence = refuse([*argv(base_weights="nf4", lora_rank=2), "--dry-run"], capsys)
    assert "--base-weights nf4: does not work on this cpu" in sentence
    assert "pip install bitsandbytes==" in sentence
