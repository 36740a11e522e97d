"""Laws of adapters: lora.py, on random checkpoints."""

import json
import sys
from functools import partial
from pathlib import Path

import deepspeed
import diffusers
import numpy as np
import peft
import pytest
import torch
from by_hand import merged
from conftest import distance, refusal  # which sets the environment, for the launched program too
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from launch import ROOT, launch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model import MISFITS, write_lora
from torch.func import functional_call
from torch.nn.functional import softplus

import model
from system import hub, processes
from training import lora
from weights import loading

both = pytest.mark.parametrize("kind", ["sdxl", "sd15"])
ABAR = torch.linspace(0.999, 0.001, 1000)


def predict(unet, kind="sdxl", dtype=torch.float32, items=slice(0, 2), shift=0):
    """What a UNet, engine or reference of the random checkpoints predicts, through model.py."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(shift))
    x, text, pooled, t = draw(2, 4, 8, 8), draw(2, 7, 32), draw(2, 16), torch.tensor([300, 700])
    added = {"text_embeds": pooled[items].to(dtype), "time_ids": torch.ones(2, 6)[items].to(dtype)}
    cond = {"encoder_hidden_states": text[items].to(dtype), "added_cond_kwargs": added}
    if kind == "sd15":
        cond = {"encoder_hidden_states": text[items, :, :16].to(dtype)}
    return model.predict_noise(unet, x[items], t[items], cond, ABAR)


def fresh(folder) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")


def adapted(folder, alpha=6.0, targets="all"):
    """A UNet whose adapter of rank 4 changes what it predicts, as one does after training."""
    unet = fresh(folder)
    lora.attach(unet, 4, alpha, targets)
    generator = torch.Generator().manual_seed(1)
    for weight in lora.trainable(unet).values():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return unet


def gradients(unet, loss) -> dict[str, torch.Tensor]:
    weights = lora.trainable(unet)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def assert_same(left: dict, right: dict):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# -------------------------------------------------------------------------------------------------
# Start.


@both
def test_attention_targets_all_its_linear_layers_and_all_those_of_feed_forwards_too(
    checkpoint, kind
):
    unet = fresh(checkpoint(kind))
    for targets, blocks in (("attention", Attention), ("all", (Attention, FeedForward))):
        expected = {
            f"{place}.{name}"
            for place, block in unet.named_modules()
            if isinstance(block, blocks)
            for name, layer in block.named_modules()
            if isinstance(layer, torch.nn.Linear)
        }
        names = lora.trainable(adapted(checkpoint(kind), targets=targets))
        assert {name.split(".lora_")[0] for name in names} == expected
        assert len(names) == 2 * len(expected) > 0


@both
def test_the_number_of_parameters_is_known_from_the_configuration(checkpoint, kind):
    unet = fresh(checkpoint(kind))
    for targets in lora.TARGETS:
        counted = lora.parameters(dict(unet.config), 3, targets)
        config = peft.LoraConfig(r=3, target_modules=lora.TARGETS[targets])
        theirs = peft.get_peft_model(fresh(checkpoint(kind)), config)
        assert counted == theirs.get_nb_trainable_parameters()[0]
        linear = (m for m in unet.modules() if isinstance(m, (Attention, FeedForward)))
        if targets == "all":
            layers = (x for m in linear for x in m.modules() if isinstance(x, torch.nn.Linear))
            assert counted == sum(3 * (x.in_features + x.out_features) for x in layers)


@both
def test_the_start_is_the_model_itself_and_only_the_adapter_is_trained(checkpoint, kind):
    unet, base = fresh(checkpoint(kind)), fresh(checkpoint(kind))
    lora.attach(unet, 4, 16.0)
    assert torch.equal(predict(unet, kind), predict(base, kind))
    A = torch.cat([w.flatten() for name, w in lora.trainable(unet).items() if "lora_A" in name])
    assert abs(A.mean()) < 0.01 and A.std().item() == pytest.approx(1 / 4, rel=0.03)
    assert all((w == 0).all() for name, w in lora.trainable(unet).items() if "lora_A" not in name)
    kept = {name.replace(".base_layer.", "."): w for name, w in unet.state_dict().items()}
    assert_same({n: w for n, w in kept.items() if ".lora_" not in n}, base.state_dict())
    assert {n for n, w in unet.named_parameters() if w.requires_grad} == {
        n for n, _ in unet.named_parameters() if ".lora_" in n
    }


def test_the_start_is_a_function_of_the_seed_and_leaves_the_random_state_alone(checkpoint):
    drawn = []
    for seed in (5, 5, 6):
        unet = fresh(checkpoint())
        torch.randn(seed + len(drawn))  # whatever was drawn before
        before = torch.get_rng_state()
        lora.attach(unet, 4, 4.0, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(lora.trainable(unet))
    assert_same(drawn[0], drawn[1])
    name = min(drawn[0])
    assert "lora_A" in name and not torch.equal(drawn[0][name], drawn[2][name])


# -------------------------------------------------------------------------------------------------
# The reference.


def by_hand(base, factors: dict, scale: float):
    """base with W + scale B A in the place of W, as a function; factors: by lora.py's names."""

    def call(*args, **kwargs):
        return functional_call(base, merged(base.state_dict(), factors, scale), args, kwargs)

    return call


@both
def test_the_adapter_adds_alpha_over_r_b_a_and_without_it_the_model_is_the_base(checkpoint, kind):
    unet, base = adapted(checkpoint(kind)), fresh(checkpoint(kind))
    expected = predict(by_hand(base, lora.trainable(unet), 6 / 4), kind)
    policy, reference = predict(unet, kind), predict(lora.AdapterOff(unet), kind)
    torch.testing.assert_close(policy, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(reference, predict(base, kind)) and not reference.requires_grad
    assert (policy - reference).abs().max() > 0.1


def test_the_reference_leaves_no_trace_on_the_policy(checkpoint):
    unet = adapted(checkpoint())
    off, trained = lora.AdapterOff(unet), set(lora.trainable(unet))
    before = predict(unet)
    expected = gradients(unet, before.square().mean())

    def same():
        after = predict(unet)
        assert torch.equal(before, after) and set(lora.trainable(unet)) == trained
        assert_same(gradients(unet, after.square().mean()), expected)

    predict(off)
    same()
    layer = unet.up_blocks[0].attentions[1].transformer_blocks[0].norm3
    hook = layer.register_forward_hook(lambda *_: 1 / 0)  # out of memory, an interrupt
    with pytest.raises(ZeroDivisionError):
        predict(off)
    hook.remove()
    same()


def test_checkpointed_activations_are_recomputed_with_the_adapters_on(checkpoint):
    unet, grads = adapted(checkpoint()), []
    off = lora.AdapterOff(unet)
    for _ in range(2):
        policy = predict(unet)  # the reference comes before its backward, on an x with a gradient
        reference = predict(lambda x, *rest, **cond: off(x.requires_grad_(), *rest, **cond))
        assert policy.requires_grad and not reference.requires_grad
        grads.append(gradients(unet, (policy - reference).square().mean()))
        unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    assert_same(*grads)


def test_the_reference_in_bf16_is_the_base_in_bf16(checkpoint):
    unet = adapted(checkpoint()).bfloat16()
    base = fresh(checkpoint()).bfloat16()
    off = lora.AdapterOff(unet)
    assert torch.equal(predict(off, dtype=torch.bfloat16), predict(base, dtype=torch.bfloat16))


# -------------------------------------------------------------------------------------------------
# DeepSpeed. This file is also the program that two processes run.

STEPS, ACCUMULATION, LR = 2, 2, 0.1  # in step 1 the policy still is the reference


def small() -> diffusers.UNet2DConditionModel:
    """As few layers as a UNet with attention can have: ZeRO-3 gathers them one by one."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    )


def micro_loss(policy, reference, number: int, items=slice(0, 2)) -> torch.Tensor:
    """A loss of a micro-step in which policy and reference meet as in the job; of these items."""
    at = partial(predict, kind="sd15", items=items)
    with torch.no_grad():
        tau = at(policy, shift=2 * number + 1)  # a forward like that of inversion
    err_ref = (at(reference, shift=2 * number) - tau).square().mean((1, 2, 3))
    err = (at(policy, shift=2 * number) - tau).square().mean((1, 2, 3))
    return softplus(100 * (err - err_ref)).mean()


def train(ds_config: str) -> dict[str, torch.Tensor]:
    """The adapter after STEPS of DeepSpeed, from however many ranks there are (collective)."""
    processes.join()
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    config = json.loads(Path(ds_config).read_text())
    config = {key: config[key] for key in config if key not in ("bf16", "tensorboard")}
    config |= {"train_micro_batch_size_per_gpu": 2 // world, "train_batch_size": 2 * ACCUMULATION}
    config["optimizer"]["params"]["lr"] = LR
    unet = small()
    lora.attach(unet, 4, 8.0, "all", seed=1)
    unet.enable_gradient_checkpointing()
    weights = lora.trainable(unet)
    engine, *_ = deepspeed.initialize(
        model=unet, model_parameters=list(weights.values()), config=config
    )
    mine = slice(0, 2) if world == 1 else slice(rank, rank + 1)
    reference = lora.AdapterOff(engine)
    for number in range(STEPS * ACCUMULATION):
        engine.backward(micro_loss(engine, reference, number, mine))
        engine.step()
    full = deepspeed.utils.safe_get_full_fp32_param
    return {name: full(weight).detach().clone() for name, weight in weights.items()}


def train_by_hand():
    """(adapter at the start, after the steps), by W + 8/4 B A and torch alone."""
    base, unet = small().requires_grad_(False), small()
    lora.attach(unet, 4, 8.0, "all", seed=1)
    start = {name: weight.detach() for name, weight in lora.trainable(unet).items()}
    weights = {name: weight.clone().requires_grad_() for name, weight in start.items()}
    adamw = torch.optim.AdamW(weights.values(), LR, (0.9, 0.999), 1e-2, 0.01)

    policy = by_hand(base, weights, 8 / 4)
    for step in range(STEPS):
        adamw.zero_grad()
        for number in range(step * ACCUMULATION, (step + 1) * ACCUMULATION):
            (micro_loss(policy, base, number) / ACCUMULATION).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        adamw.step()
    return start, {name: weight.detach() for name, weight in weights.items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_under_every_zero_stage_equal_those_of_plain_torch(
    ranks, ds_config, tmp_path, monkeypatch
):
    configs = [str(ds_config(stage)) for stage in (1, 2, 3)]
    if ranks == 1:
        found = [train(config) for config in configs]
    else:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        program = Path(__file__).relative_to(ROOT)
        launch([str(tmp_path / "found.pt"), *configs], 2, str(program))
        found = torch.load(tmp_path / "found.pt")
    start, expected = train_by_hand()
    moved = distance(expected, start)
    assert moved > 0.01
    for stage, weights in enumerate(found, 1):
        assert distance(weights, expected) < 1e-3 * moved, f"ZeRO-{stage}"


# -------------------------------------------------------------------------------------------------
# Save and load.


def saved(unet, folder, **options):
    lora.save(lora.trainable(unet), unet, folder, "a title", **options)
    return str(folder)


def pipeline_of(folder, kind):
    pipeline = getattr(diffusers, f"StableDiffusion{'XL' * (kind == 'sdxl')}Pipeline")
    return pipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "kind, alpha", [("sdxl", 4.0), ("sdxl", 6.0), ("sd15", 6.0), ("sdxl", 8.0)]
)  # of rank 4; peft's default is 8
def test_what_is_saved_predicts_exactly_what_was_trained(checkpoint, tmp_path, kind, alpha):
    unet, pipeline = adapted(checkpoint(kind), alpha), pipeline_of(checkpoint(kind), kind)
    pipeline.load_lora_weights(saved(unet, tmp_path))
    assert torch.equal(predict(pipeline.unet, kind), predict(unet, kind))
    with safe_open(tmp_path / hub.LORA, "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (said["unet.r"], said["unet.lora_alpha"]) == (4, alpha)
    assert (
        said["unet.rank_pattern"] == said["unet.alpha_pattern"] == {}
    )  # diffusers 0.35 reads them


@both
def test_what_is_saved_draws_what_was_trained_when_it_is_fused_for_evaluation(
    checkpoint, tmp_path, kind
):
    unet, pipeline = adapted(checkpoint(kind)), loading.load_pipeline(str(checkpoint(kind)))
    assert hub.kind(saved(unet, tmp_path)) == "lora"
    fused = loading.load_any(str(tmp_path), str(checkpoint(kind)))
    torch.testing.assert_close(predict(fused.unet, kind), predict(unet, kind), rtol=1e-4, atol=1e-5)
    pipeline.register_modules(unet=unet)
    a, b = (
        np.asarray(model.sample(p, ["a red circle"], [3], 2, 2.0)[0]) for p in (fused, pipeline)
    )
    assert np.abs(a.astype(int) - b).max() <= 1


def test_a_file_in_half_precision_is_half_as_long_and_rounded_once(checkpoint, tmp_path):
    unet = adapted(checkpoint())
    whole = load_file(f"{saved(unet, tmp_path / 'a')}/{hub.LORA}")
    half = load_file(f"{saved(unet, tmp_path / 'b', dtype=torch.float16)}/{hub.LORA}")
    assert {w.dtype for w in whole.values()} == {torch.float32}
    assert_same(half, {name: w.half() for name, w in whole.items()})


# -------------------------------------------------------------------------------------------------
# Starting from a LoRA.


@pytest.mark.parametrize(
    "kind, written", [("sdxl", "with alpha"), ("sd15", "by another trainer"), ("sdxl", "in fp16")]
)
def test_an_adopted_lora_is_trained_on_against_the_model_without_it(
    checkpoint, tmp_path, kind, written
):
    """Its targets are not ours: convolutions are among them."""
    options = dict(kohya=True, metadata=False) if written == "by another trainer" else {}
    file, tensors = write_lora(checkpoint(kind), tmp_path, text=False, alpha=6.0, **options)
    if written == "in fp16":
        save_file({name: tensor.half() for name, tensor in tensors.items()}, file)
    theirs, pipeline = (pipeline_of(checkpoint(kind), kind) for _ in range(2))
    theirs.load_lora_weights(file)
    theirs.unet.to(torch.float32)
    lora.adopt(pipeline.unet, str(tmp_path if written == "with alpha" else file), "it")
    unet, start = pipeline.unet, predict(pipeline.unet, kind)
    assert torch.equal(start, predict(theirs.unet, kind))
    assert torch.equal(predict(lora.AdapterOff(unet), kind), predict(fresh(checkpoint(kind)), kind))
    assert all(".lora_" in name for name in lora.trainable(unet))
    assert {w.dtype for w in unet.parameters()} == {torch.float32}

    grads = gradients(unet, start.square().mean())
    assert all(grad.abs().max() > 0 for grad in grads.values())
    for name, weight in lora.trainable(unet).items():
        weight.data -= 0.1 * grads[name]
    again = pipeline_of(checkpoint(kind), kind)
    again.load_lora_weights(saved(unet, tmp_path / "out"))
    assert torch.equal(predict(again.unet, kind), predict(unet, kind))
    assert not torch.equal(predict(unet, kind), start)


def test_a_merged_lora_is_in_the_reference(checkpoint, tmp_path):
    base = str(checkpoint())
    file, _ = write_lora(base, tmp_path)
    fused = predict(loading.load_any(str(file), base).unet)
    unet = loading.load_any(str(file), base).unet
    lora.attach(unet, 2, 2.0)
    assert torch.equal(predict(unet), fused)
    assert torch.equal(predict(lora.AdapterOff(unet)), fused)
    assert not torch.equal(fused, predict(fresh(checkpoint())))


@pytest.mark.parametrize(
    "misfit",
    [
        "stray",
        "halved",
        "of another model",
        "misshapen",
        "a whole UNet",
    ],
)
def test_a_lora_of_which_something_would_be_lost_is_refused(checkpoint, tmp_path, misfit):
    file, weights = write_lora(checkpoint(), tmp_path, text=False)
    save_file(MISFITS[misfit][0](weights), file)
    sentence = refusal(lora.adopt, fresh(checkpoint()), str(file), "it")
    assert sentence.startswith(f"The LoRA '{file}' does not fit 'it': ")
    assert MISFITS[misfit][1] in sentence


@pytest.mark.parametrize("kohya", [False, True])
def test_a_lora_of_text_encoders_is_refused_with_the_fix(checkpoint, tmp_path, kohya):
    def as_te(weights):
        names = {key: key.replace("lora_text_encoder", "lora_te") for key in weights}
        return {names[key]: weight for key, weight in weights.items()}

    file, weights = write_lora(checkpoint(), tmp_path, kohya=kohya)
    save_file(as_te(weights), file)
    sentence = refusal(lora.adopt, fresh(checkpoint()), str(file), "it")
    assert f"'{file}' has 4 tensors of text encoders" in sentence
    assert "--lora-start merge" in sentence


def test_what_is_no_lora_is_refused(checkpoint, tmp_path):
    unet = fresh(checkpoint())
    (tmp_path / "no.safetensors").write_bytes(b"no")
    for path, words in {
        str(tmp_path): hub.LORA,
        str(tmp_path / "no.safetensors"): "cannot be read",
        str(tmp_path / "nowhere"): "Unknown LoRA",
    }.items():
        sentence = refusal(lora.adopt, unet, path, "it")
        assert path in sentence and words in sentence


if __name__ == "__main__":
    out, *configs = sys.argv[1:]
    found = [train(config) for config in configs]
    if processes.is_main():
        torch.save(found, out)
