"""Small random checkpoints in the published layouts, colour pairs, and short runs on them; and what
makes a test independent of the processor, and of the tests before it."""

import contextlib
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

cache = tempfile.TemporaryDirectory(prefix="datasets-")
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # before torch; children inherit it
os.environ |= {"HF_DATASETS_CACHE": cache.name}
# Under nohup SIGHUP is ignored, also by what the tests start; a handler is not inherited.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

import diffusers
import launch
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from huggingface_hub import constants
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

import train_inpo
from lab import pretrain
from system import processes
from system.files import ROOT, UserError
from training import plan
from training.folder import read_metrics

# -------------------------------------------------------------------------------------------------
# No test depends on those that ran before it in its process.


@pytest.fixture(scope="session", autouse=True)
def group():
    """All tests run in a group of one rank, as programs that have joined do."""
    torch.set_num_threads(1)
    processes.join()
    gc.freeze()  # DeepSpeed collects garbage at each start, of all that was imported


@pytest.fixture(autouse=True)
def isolated():
    """Each test finds what the first one found, and leaves no rank running."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    world, environment, folder = dist.group.WORLD, dict(os.environ), Path.cwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for rank in list(launch.running):
        rank.kill()
    launch.running.clear()
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.nn.functional.linear = torch._C._nn.linear  # ZeRO-3 puts one of its own there, for good
    assert dist.group.WORLD is world, "the test has left or destroyed the process group"
    assert torch.get_default_dtype() == torch.float32 and torch.get_num_threads() == 1


# -------------------------------------------------------------------------------------------------
# What tests train, and on what.


def save_pipeline(folder, kind: str, prediction: str, channels=(16, 32)):
    """A random pipeline of 16 px, VAE factor 2; kind: sdxl or sd15, prediction: as in diffusers,
    channels: of the UNet's levels, two, or one without a middle."""
    torch.manual_seed(0)
    tokenizer = pretrain.write_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
    )
    sdxl = kind == "sdxl"
    extra = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 16,
        "use_linear_projection": True,
    }
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[-len(channels) :],
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[-len(channels) :],
        mid_block_type="UNetMidBlock2DCrossAttn" if len(channels) > 1 else None,
        attention_head_dim=2,
        cross_attention_dim=32 if sdxl else 16,
        norm_num_groups=8,
        **(extra if sdxl else {}),
    )
    schedule = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
        "prediction_type": prediction,
    }
    if sdxl:
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text),
            text_encoder_2=CLIPTextModelWithProjection(text),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=diffusers.EulerDiscreteScheduler(**schedule),
            add_watermarker=False,
        )
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, **schedule),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(kind, prediction, channels) -> folder of a random pipeline, made on first use."""
    made = {}

    def get(kind: str = "sdxl", prediction: str = "epsilon", channels=(16, 32)):
        if (kind, prediction, channels) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{prediction}")
            save_pipeline(folder, kind, prediction, channels)
            made[kind, prediction, channels] = folder
        return made[kind, prediction, channels]

    return get


@pytest.fixture
def on_hub(monkeypatch, tmp_path):
    """on_hub(folder) -> a hub id whose files are in the cache, as they are once downloaded."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def add(folder):
        name, commit = Path(folder).name, "f00d" * 10
        repository = tmp_path / "cache" / f"models--owner--{name}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        return f"owner/{name}"

    return add


def refusal(action, *arguments, **options) -> str:
    """The one sentence of a UserError."""
    with pytest.raises(UserError) as error:
        action(*arguments, **options)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


def png(color) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A parquet file of 24 pairs: each winner is light and each loser dark, labels alternate."""
    rows = {"jpg_0": [], "jpg_1": [], "label_0": [], "caption": []}
    for i in range(24):
        winner, loser = png((255, 200 + i, 255)), png((0, i, 0))
        first = i % 2 == 0
        rows["jpg_0"].append(winner if first else loser)
        rows["jpg_1"].append(loser if first else winner)
        rows["label_0"].append(1.0 if first else 0.0)
        rows["caption"].append(f"a {'red' if i % 3 else 'blue'} circle")
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pq.write_table(pa.table(rows), path)
    return path


ADAMW = {"betas": [0.9, 0.999], "weight_decay": 0.01, "torch_adam": True}


@pytest.fixture(scope="session")
def ds_config(tmp_path_factory):
    """ds_config(stage, clipping, key=value, ...) -> a file.

    AdamW's eps is as large as the gradients, clipped to norm 1 or not, which makes a step a smooth
    function of them: rounding near zero does not flip the sign of a step. ZeRO-3 shards even the
    small tensors of a random checkpoint, which it would otherwise keep whole on every rank."""
    folder = tmp_path_factory.mktemp("ds_config")

    def write(stage: int = 2, clipping: float = 1.0, **keys) -> Path:
        config = json.loads((ROOT / "ds_config.json").read_text())
        config["zero_optimization"] |= {"stage": stage, "stage3_param_persistence_threshold": 0}
        config["optimizer"]["params"] = ADAMW | {"eps": 1e-2 if clipping else 1.0}
        config["gradient_clipping"] = clipping
        path = folder / f"{len(list(folder.iterdir()))}.json"
        path.write_text(json.dumps(config | keys))
        return path

    return write


@pytest.fixture(scope="session")
def command(checkpoint, pairs, ds_config):
    """command(out, flag=value, ...) -> a short run's command line; None leaves a flag out."""
    plain = ds_config()

    def build(out: Path, **flags) -> list[str]:
        flags = {
            "model": checkpoint(), "data": pairs, "out": out, "ds_config": plain,
            "steps": 2, "batch": 4, "micro_batch": 2, "lr": 1e-2, "warmup": 2, "beta": 500,
            "workers": 0, "sample_every": 0, "checkpoint_every": 0,
        } | flags  # fmt: skip
        given = {key: value for key, value in flags.items() if value is not None}
        return [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]

    return build


@pytest.fixture
def argv(command, tmp_path):
    """argv(flag=value, ...) -> that command line, by default into a folder of the test's own."""
    return lambda **flags: command(**{"out": tmp_path / "run"} | flags)


# -------------------------------------------------------------------------------------------------
# What a run has left.


def metrics(out) -> list[dict]:
    return read_metrics(Path(out))


def untimed(out) -> list[dict]:
    """metrics, without what depends on the machine."""
    timed = "seconds", "pairs_per_second", "waiting"
    return [{k: v for k, v in line.items() if k not in timed} for line in metrics(out)]


def weights(folder) -> dict[str, torch.Tensor]:
    """Of the UNet of a pipeline."""
    return diffusers.UNet2DConditionModel.from_pretrained(Path(folder) / "unet").state_dict()


def distance(a: dict, b: dict) -> float:
    """The largest difference of two state dictionaries."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def refuse(argv: list[str], capsys) -> str:
    """The sentence on stderr of a command that must be refused with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_inpo.main(argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    sentences = [line for line in said.splitlines() if line.startswith("train_inpo.py: error: ")]
    assert len(sentences) == 1 and "Traceback" not in said
    return sentences[0]


@pytest.fixture
def half(monkeypatch):
    """The plan takes fp32 on a CPU, where half precision does not pay; here it is made not to."""
    gpu = SimpleNamespace(device_name=lambda: "cuda")
    monkeypatch.setattr(plan, "get_accelerator", lambda: gpu)


@contextlib.contextmanager
def small_disk(size: int):
    """No file may grow beyond that many bytes; Python ignores the signal, writing fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
