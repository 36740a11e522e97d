"""budget.py: the counter against what is alive, the arithmetic against DeepSpeed's own tensors."""

from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from diffusers import AutoencoderKL
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import model
from system import processes
from training import budget, lora
from weights import loading

BF16 = torch.bfloat16
SMALL = {  # SDXL's kinds of blocks
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2), "attention_head_dim": 2, "cross_attention_dim": 32,
    "norm_num_groups": 8, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40,
}  # fmt: skip


class Alive(TorchDispatchMode):
    """Bytes of all storages made inside on the device, weights aside, that are alive: now, at the
    peak."""

    def __init__(self, weights=(), device: str = "cpu"):
        super().__init__()
        self.device = device
        self.weights = {weight.untyped_storage()._cdata for weight in weights}
        self.made, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == self.device:
                storage = x.untyped_storage()
                if storage._cdata not in self.weights:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        self.made = {key: value for key, value in self.made.items() if not value[0].expired()}
        return sum(size for _, size in self.made.values())


# -------------------------------------------------------------------------------------------------
# Work.


def test_unet_calls_are_those_of_the_design():
    grid = range(1, 11)
    for objective, inverting, pairs, adapters, calls in (
        ("dpo", grid, 1, False, 2 * (5.5 + 1 + 3)), ("dpo", grid, 10, True, 20 * (5.5 + 1 + 2)),
        ("dpo", [0], 1, False, 2 * (1 + 3)), ("kto", [0], 1, True, 2 * (1 + 2)),
        ("sft", [0], 1, False, 3), ("sft", [0], 3, True, 3 * 2), ("sft", grid, 1, False, 8.5),
    ):  # fmt: skip
        assert budget.unet_calls(objective, pairs, inverting, adapters) == calls
    assert budget.unet_calls("dpo", 1, iter([1, 1, 4])) == 2 * (2 + 4)  # of the cells drawn


# -------------------------------------------------------------------------------------------------
# Activations.


def small(device: str, rank: int | None = None, dtype=torch.float32):
    unet = budget.build(SMALL, device, dtype)
    if rank:
        lora.attach(unet, rank, rank)
    return unet


def alive_after_forward(unet) -> tuple[int, int]:
    """Bytes that a real forward of a pair leaves alive, without its output, and those of x0."""
    t, abar = torch.zeros(2, dtype=torch.int64), torch.ones(1000)
    with Alive(unet.parameters()) as alive:
        x0, cond = budget.random_inputs(unet, 1)
        out = model.predict_noise(unet, x0, t, cond, abar)
        return alive.now() - out.nbytes, x0.nbytes


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_counted_is_what_a_real_forward_leaves_alive(rank, checkpointing):
    counted, block = budget.kept_by_forward(small("meta", rank), 1, checkpointing)
    real = small("cpu", rank)
    if checkpointing:
        real.enable_gradient_checkpointing()
    alive, x0 = alive_after_forward(real)
    assert (block > 0) == checkpointing
    assert counted <= alive <= counted + x0 + 256  # inputs that nobody needs any more


def test_largest_block_is_what_a_real_one_leaves_alive():
    unet, grown = small("cpu"), []

    def block(module, *inputs):
        before = alive.now()
        out = module(*inputs)
        grown.append(alive.now() - before - out.nbytes)
        return out

    unet.enable_gradient_checkpointing(block)
    with Alive(unet.parameters()) as alive:
        x0, cond = budget.random_inputs(unet, 1)
        t = torch.zeros(2, dtype=torch.int64)
        model.predict_noise(unet, x0, t, cond, torch.ones(1000))
    assert budget.kept_by_forward(small("meta"), 1, True)[1] == max(grown)
    assert len(grown) == 7 + 8  # all resnets but the middle's first, all transformer blocks


def config_of(stage: int, offload: str = "none", fp32=("grad_accum", "reduce"), **zero) -> dict:
    zero |= {"stage": stage, "offload_optimizer": {"device": offload}}
    config = {"zero_optimization": zero, "bf16": {"enabled": True}}
    if "grad_accum" in fp32:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if "reduce" in fp32:
        config["communication_data_type"] = "fp32"
    return config


def small_memory(stage=2, dtype=BF16, latent=8, zero=(), **flags) -> dict[str, float]:
    given = {"world": 1, "micro_batch": 1} | flags
    config = config_of(stage, **dict(zero))
    return budget.step_memory(SMALL | {"sample_size": latent}, config, dtype, **given)


def test_activations_are_those_of_torchs_own_linear(monkeypatch):
    """Also where ZeRO-3 has put its own into torch, which keeps the inputs of frozen weights."""
    unet = budget.build(SMALL, "meta", torch.float32)
    with torch.device("meta"):
        lora.attach(unet, 2, 2, "attention")
    before = budget.kept_by_forward(unet, 1, False)
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    assert budget.kept_by_forward(unet, 1, False) == before


def test_activations_are_proportional_to_the_images():
    one, three = (budget.kept_by_forward(small("meta"), pairs, False)[0] for pairs in (1, 3))
    assert three == 3 * one
    parts = [small_memory(micro_batch=n, images=k)["activations"] for n, k in ((1, 1), (3, 2))]
    assert parts[1] == pytest.approx(6 * parts[0])


def test_activations_shrink_with_checkpointing_half_precision_and_smaller_latents():
    most = small_memory(checkpointing=False, dtype=torch.float32)["activations"]
    assert small_memory(dtype=torch.float32)["activations"] < most / 3
    half = small_memory(checkpointing=False)["activations"]
    assert most / 2 <= half < 0.52 * most  # statistics of attention stay fp32
    assert small_memory(checkpointing=False, latent=4)["activations"] < half / 2


# -------------------------------------------------------------------------------------------------
# The rest.


def state(stage, world=8, reference=True, **config):
    gib = 2**30  # parameters, so that a byte a parameter is a GiB
    config = config_of(stage, reduce_bucket_size=gib // 4, **config)
    return budget.state(gib, config, BF16, world, reference)


def test_state_follows_the_zero_stages():
    parts = ("weights", "reference", "gradients", "optimizer")
    for stage, expected in {
        1: (2, 2, 4 + 2, 12 / 8),
        2: (2, 2, 4 / 8, 12 / 8),
        3: (2 / 8, 2 / 8, 4 / 8, 12 / 8),
    }.items():
        assert tuple(state(stage)[part] for part in parts) == expected
        assert sum(state(stage, reference=False).values()) == (
            sum(state(stage).values()) - expected[1]
        )


def test_buckets_and_step_are_those_of_the_stage():
    assert state(1)["buckets"] == 0
    assert state(2)["buckets"] == 2 * 2 / 4 + (2 + 4) / 4
    assert state(2, fp32=["grad_accum"])["buckets"] == 3 * 2 / 4
    assert state(3, world=1)["buckets"] == 2 * 4 / 4
    gathered = 2 * (budget.LIVE + budget.PREFETCH) / 2**30
    assert state(3)["buckets"] == pytest.approx(2 * 4 / 4 + gathered)
    assert (state(1)["step"], state(2)["step"]) == (4 / 8, 4 / 8)
    assert state(1, fp32=["grad_accum"])["step"] == 2  # all gradients, rounded for the reduction
    assert state(3)["step"] == 8 / 8 + 4 / 4


def test_offload_frees_the_optimizer_and_under_zero_3_the_gradients():
    two, three = (state(stage, offload="cpu") for stage in (2, 3))
    assert two == state(2) | {"optimizer": 0, "step": 0}
    assert three == state(3) | {"optimizer": 0, "step": 0, "gradients": 0}


def test_what_a_configuration_leaves_out_is_deepspeeds_default():
    zero = DeepSpeedZeroConfig(stage=3)
    assert (zero.reduce_bucket_size, zero.max_live_parameters) == (budget.BUCKET, budget.LIVE)
    assert (zero.prefetch_bucket_size, zero.sub_group_size) == (budget.PREFETCH, budget.SUB_GROUP)
    config = {"zero_optimization": {"stage": 3}}
    found = budget.state(2**30, config, BF16, 1)
    assert found == budget.state(2**30, config_of(3, fp32=(), reduce_bucket_size=5e8), BF16, 1)


def test_lora_trains_its_adapters_alone_and_needs_no_second_unet():
    rank = 4
    full, adapted = small_memory(stage=1), small_memory(stage=1, rank=rank)
    layers = dict(small("meta").named_modules())
    adapters = sum(
        rank * (layer.in_features + layer.out_features)
        for name, layer in layers.items()
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
    )
    assert adapters > 0 and adapted["reference"] == 0
    assert adapted["weights"] == pytest.approx(full["weights"] + 2 * adapters / 2**30)
    assert adapted["optimizer"] == pytest.approx(12 * adapters / 2**30)
    assert adapted["gradients"] == pytest.approx(6 * adapters / 2**30)
    assert adapted["activations"] < full["activations"]  # frozen weights need no inputs


def test_the_sum_is_the_largest_of_three_peaks():
    step = 4 * loading.count_parameters(SMALL) / 2**30
    for pairs, vae in ((1, 0.0), (8, 0.0), (1, 20.0), (8, 20.0)):
        zero = {"reduce_bucket_size": 1000}
        parts = small_memory(micro_batch=pairs, zero=zero, encoders=1.5, vae=vae)
        assert parts["encoders"] == 1.5
        backward = parts["buckets"] + parts["activations"]
        peak = max(backward, step)
        assert backward + parts["step"] == pytest.approx(peak)
        assert peak + parts["vae"] == pytest.approx(max(peak, vae))
    held = {"reduce_bucket_size": 2**29}  # 2 GiB in fp32, of which none is free for the VAE
    small, more = (small_memory(stage=3, zero=held, vae=vae) for vae in (4.0, 5.0))
    peak = sum(small[part] for part in ("buckets", "activations", "step", "vae"))
    assert peak == pytest.approx(2 + 4) and small["vae"] > 0
    assert sum(more.values()) == pytest.approx(sum(small.values()) + 1)


def small_ds_config(stage: int) -> dict:
    """For DeepSpeed itself: torch's AdamW, two micro-steps of one sample."""
    config = config_of(
        stage, contiguous_gradients=True, overlap_comm=True, reduce_bucket_size=20_000,
        stage3_param_persistence_threshold=0,
    )  # fmt: skip
    config["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-5}}
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    return config | {"gradient_clipping": 1.0}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_is_what_deepspeed_holds(stage):
    import deepspeed

    processes.join()
    layers, width = 4, 128
    with Alive() as alive:
        net = torch.nn.Sequential(*(torch.nn.Linear(width, width, False) for _ in range(layers)))
        net.to(BF16)
        config = small_ds_config(stage)
        engine, *_ = deepspeed.initialize(
            model=net, model_parameters=list(net.parameters()), config=config
        )
        x = torch.ones(1, width, dtype=BF16)
        for _ in range(3):  # ends within a step
            alive.peak = 0
            engine.backward(engine(x).float().square().mean())
            held, backward = alive.now(), alive.peak
            engine.step()
    count = layers * width**2
    parts = budget.state(count, config, BF16, 1, reference=False)
    parts = {part: size * 2**30 for part, size in parts.items()}
    kept = parts["weights"] + parts["gradients"] + parts["optimizer"]
    kept += parts["vae"]  # of ZeRO-3 the bucket is for good
    assert kept <= held <= kept + 4096
    layer = 8 * width**2  # one gradient, raw and in fp32 on its way, is not counted
    sum_of_parts = kept + parts["buckets"] - parts["vae"]
    assert sum_of_parts - layer <= backward <= sum_of_parts + layer + 4096


def published_vae() -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
            up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_vae_at_its_peak_is_what_is_alive_when_it_encodes_or_decodes(dtype):
    vae = published_vae().to(dtype)

    def peak(action, *shape) -> float:
        x = torch.empty(shape, device="meta", dtype=dtype)
        fused = mock.patch.object(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda q, k, v, **_: budget.FusedAttention.apply(q, k, v),
        )
        with torch.no_grad(), fused, Alive(vae.parameters(), "meta") as alive:
            action(x)
        return alive.peak / 2**30

    sizes = [(1024, 4, 1, 1), (512, 1, 1, 1), (512, 8, 1, 4), (768, 2, 1, 1)]
    sizes += [(256, 2, 1, 2), (128, 1, 2, 1), (64, 1, 2, 1), (64, 8, 8, 8)]
    for side, batch, images, pictures in sizes:
        encoding = peak(vae.encode, images, 3, side, side)
        assert budget.vae_peak(dtype, side, 0, batch) == pytest.approx(encoding, rel=1e-3)
        decoding = peak(vae.decode, pictures, 4, side // 8, side // 8)
        assert budget.vae_peak(dtype, side, side, batch) == pytest.approx(
            max(encoding, decoding), rel=1e-3
        )


def test_encoders_have_the_published_sizes():
    vae = published_vae()
    with torch.device("meta"):
        clip = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        big = CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
            projection_dim=1280,
        )  # fmt: skip
        parts = vae, CLIPTextModel(clip), CLIPTextModelWithProjection(big)
    counts = tuple(sum(weight.numel() for weight in part.parameters()) for part in parts)
    assert counts == (budget.VAE, budget.CLIP_L, budget.BIG_G)
    assert budget.encoders("sdxl", BF16, torch.float32) == pytest.approx(
        (4 * counts[0] + 2 * counts[1] + 2 * counts[2]) / 2**30
    )
    assert budget.encoders("sd15", BF16, BF16) == 2 * (counts[0] + counts[1]) / 2**30
