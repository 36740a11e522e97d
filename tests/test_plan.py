"""plan.py and card.py: what the plan tells of memory, work and disk, and the model card."""

import dataclasses
import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import distance, refusal

import train_inpo
from lab import architectures
from system import hub
from system.files import UserError
from training import budget, card, lora, plan
from training.flags import parse
from weights import loading, loras

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def published(tmp_path):
    """published("sdxl" or "sd15", key=value of the VAE, ...) -> a folder of configurations."""

    def write(kind: str, **vae) -> Path:
        name = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline"}[kind]
        parts = {
            "model_index": {"_class_name": name},
            "unet/config": architectures.CONFIGS[kind],
            "vae/config": {"block_out_channels": (128, 256, 512, 512)} | vae,
            "text_encoder/config": {"max_position_embeddings": 77},
            "scheduler/scheduler_config": {"num_train_timesteps": 1000},
        }
        for file, content in parts.items():
            path = tmp_path / kind / f"{file}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        return tmp_path / kind

    return write


def planned(argv: list[str]) -> dict[str, str]:
    """The words of the plan by the name of their line, that of the warning is ""."""
    args = parse("", argv)
    lines = plan.describe(args, plan.check(args)).splitlines()
    words = {line[2:14].strip(): line[14:] for line in lines if line.startswith("  ")}
    return words | {"": "".join(x for x in lines if not x.startswith("  "))}


def test_a_dry_run_copies_no_data(argv, monkeypatch, tmp_path):
    """It reads the labels alone: of Pick-a-Pic the copy would take 335 GB."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dry = plan.check(parse("", [*argv(), "--dry-run"]))
    assert not (tmp_path / "cache").exists()
    wet = plan.check(parse("", argv()))
    assert any((tmp_path / "cache").rglob("*.arrow"))
    assert len(dry.pairs) == len(wet.pairs) and dry.fingerprint != wet.fingerprint


def test_a_plan_refuses_a_schedule_without_noise(argv, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint(), tmp_path / "noiseless")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_start": 0.0}))
    with pytest.raises(UserError, match="noise schedule of .* cannot be used: abar"):
        plan.check(parse("", [*argv(model=folder), "--dry-run"]))


# -------------------------------------------------------------------------------------------------
# Memory.


@pytest.mark.parametrize(
    "kind, config, dtype, expected",
    [
        ("sdxl", {}, BF16, FP32),  # SDXL's own overflows
        ("sdxl", {"force_upcast": False}, BF16, torch.float16),
        ("sd15", {}, BF16, torch.float16),
        ("sd15", {}, FP32, FP32),
    ],
)
def test_the_vae_is_counted_in_the_dtype_that_it_is_loaded_in(
    kind, config, dtype, expected, published, argv, checkpoint, tmp_path
):
    planned = plan.check(parse("", argv(model=published(kind, **config))))
    folder = shutil.copytree(checkpoint(kind), tmp_path / "model")
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    loaded = loading.load_pipeline(str(folder), dtype=dtype).vae.dtype
    assert budget.vae_dtype(planned, dtype) == loaded == expected


def parts_of(words: str) -> dict[str, float]:
    return {part: float(size) for part, size in re.findall(r"(\w+) (\d+\.\d)(?=,|$)", words)}


def test_memory_is_that_of_a_gpu_with_the_encoders_of_any_folder_and_the_vae(published, argv):
    flags = {"lora_rank": 4, "micro_batch": 1, "ds_config": "configs/zero1.json", "sample_every": 1}
    args = parse("", argv(model=published("sdxl"), **flags))
    own = plan.memory_in_words(args, plan.check(args))
    assert own.startswith("about ") and " GiB a GPU, bfloat16: " in own  # here is none
    published("sdxl", force_upcast=False)  # in its place
    own, other = parts_of(own), parts_of(plan.memory_in_words(args, plan.check(args)))
    assert (own["encoders"], other["encoders"]) == (1.8, 1.7)
    activations = own["activations"]
    assert own["vae"] == pytest.approx(3.0 - activations, abs=0.06)  # GiB of a picture of 1024 px
    assert other["vae"] == pytest.approx(1.5 - activations, abs=0.06)
    args.sample_every = 0
    other = parts_of(plan.memory_in_words(args, plan.check(args)))
    assert other["vae"] == pytest.approx(1.25 - activations, abs=0.06)  # an image of a pair


def test_a_toy_has_no_line_of_memory(argv):
    assert "memory" not in planned(argv())


# -------------------------------------------------------------------------------------------------
# Work and disk.


@pytest.mark.parametrize(
    "flags", [{"inversion_steps": 4}, {"method": "dpo", "lora_rank": 2, "resolution": 32}]
)
def test_the_plan_tells_the_work_that_cost_json_has(flags, argv, tmp_path):
    words = planned(argv(**flags))  # 4 micro-steps: each cell once
    train_inpo.main(argv(**flags))
    cost = json.loads((tmp_path / "run" / "cost.json").read_text())
    expected = f"; {cost['unet_calls']:,} in all, {cost['flops']:.2e} FLOPs"
    assert words["UNet calls"].endswith(expected)


def test_checkpoints_are_at_most_those_that_a_run_has_at_a_time():
    for steps, every, keep, keep_every in itertools.product(
        (1, 7, 12), (1, 2, 5, 20), (1, 2, 9), (0, 1, 3, 4)
    ):
        kept, most = [], 0
        for step in [*range(every, steps, every), steps]:
            most = max(most, len(kept) + 1)
            newest = [*kept, step]
            old = [s for s in newest[:-keep] if keep_every and s % keep_every == 0]
            kept = old + newest[-keep:]
        assert budget.checkpoints(steps, every, keep, keep_every) == most
    assert budget.checkpoints(10**9, 1, 10**9, 7) == 10**9  # without counting them


def bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "stage, half, rank", [(2, False, 0), (2, True, 0), (3, True, 0), (1, True, 64)]
)
def test_disk_is_what_a_run_leaves(stage, half, rank, argv, ds_config, tmp_path, monkeypatch):
    if half:  # which is taken out where there is no GPU
        gpu = SimpleNamespace(device_name=lambda: "cuda")
        monkeypatch.setattr(plan, "get_accelerator", lambda: gpu)
    flags = {"lora_rank": rank, "checkpoint_every": 1, "export_every": 1, "keep": 1}
    command = argv(ds_config=ds_config(stage), lr=1e-4, **flags)
    args = parse("", command)
    parts = budget.disk(args, plan.check(args))
    assert [key.split(" of ")[0].split(",")[0] for key in parts] == [
        "2 checkpoint(s)", "2 export(s)", "the aligned model",
    ]  # fmt: skip
    train_inpo.main(command)
    out = tmp_path / "run"
    unets, names = out / "unets", (hub.LORA, hub.KOHYA_LORA)
    lora_files = sum((out / name).stat().st_size for name in names if rank)
    written = lora_files if rank else bytes_of(out / "unet")
    found = 2 * bytes_of(out / "checkpoints"), bytes_of(unets), written
    for real, said in zip(found, parts.values(), strict=True):
        assert said <= real < 1.12 * said  # names and shapes count much in a small model


def test_with_cached_latents_the_encoders_are_no_part_of_a_step(published, argv):
    """SDXL in bf16 on one GPU: their weights are left out, where a step takes more than the VAE."""
    found = []
    for words in ([], ["--cache-latents"]):
        flags = {"resolution": 512, "vae": None, "batch": 16, "micro_batch": 16}
        args = parse("", [*argv(model=published("sdxl"), **flags), *words])
        config = plan.complete(plan.read_ds_config("configs/zero1.json"), args, 1)
        found.append(budget.gpu_memory(args, plan.check(args), config, torch.bfloat16))
    live, cached = found
    assert live["encoders"] > 1.5 and cached["encoders"] == live["vae"] == cached["vae"] == 0
    assert sum(live.values()) - sum(cached.values()) == pytest.approx(live["encoders"])


def test_the_published_sizes_of_disk(published, argv):
    flags = {"checkpoint_every": 50, "steps": 400, "export_every": 100, "keep_every": 100}
    args = parse("", argv(model=published("sdxl"), **flags))
    half = dataclasses.replace(plan.check(args), dtype=BF16)
    unet, whole = 4 * 2_567_463_684, 4 * (2_567_463_684 + 83_653_863 + 123_060_480 + 694_659_840)
    assert budget.disk(args, half) == {
        "5 checkpoint(s) of 35.9 GB": 5 * 14 * unet // 4,  # 100 200 (300 350 400)
        "4 export(s) of 10.3 GB": 4 * unet,
        "the aligned model, 13.9 GB": whole,
    }
    args.judge, args.sample_every = "pickscore", 50
    assert 2 * unet in budget.disk(args, half).values()


def test_a_disk_that_is_too_small_is_a_warning_that_counts_what_the_run_has(
    argv, tmp_path, monkeypatch
):
    command, out = argv(checkpoint_every=1), tmp_path / "run"
    words = planned(command)
    assert words[""] == "" and words["disk"].endswith(" free")
    args = parse("", command)
    most = sum(budget.disk(args, plan.check(args)).values())
    usage = SimpleNamespace(free=most - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    words = planned(command)
    said = budget.in_words(most)
    assert words[""].startswith(f"Warning: --out {out}: the run may take {said} there")
    train_inpo.main(command)
    assert planned(command)[""] == "" and budget.room(out) > most
    assert "the run resumes at step 2." in plan.describe(args, plan.check(args))


def test_what_runs_but_perhaps_not_as_thought_is_warned_about(argv, checkpoint, monkeypatch):
    sd15 = checkpoint("sd15")
    assert "starts from SFT" in planned(argv(model=sd15))[""]
    assert planned(argv(model=sd15, unet=sd15))[""] == ""
    assert planned(argv(model=sd15, method="dpo"))[""] == ""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "an update sees 3 of the 10 cells" in planned(argv(batch=12))[""]
    assert planned(argv(batch=40))[""] == "" == planned(argv(batch=12, method="dpo"))[""]


# -------------------------------------------------------------------------------------------------
# Mistakes.


@pytest.mark.parametrize(
    "world, flags, fixes",
    [
        (
            8,
            {"batch": 16, "micro_batch": 16},
            "--micro-batch 2, or --batch 128, or start 1 process",
        ),
        (6, {"batch": 16, "micro_batch": 2}, "--batch 24, or start 4 process"),
        (1, {"batch": 5, "micro_batch": 2}, "--micro-batch 1, or --batch 6."),
        (2, {"batch": 5, "micro_batch": 2}, "--batch 8."),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_what_would(
    world, flags, fixes, argv, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(UserError, match=f"; give {re.escape(fixes)}") as error:
        plan.check(parse("", argv(**flags)))
    for words in re.findall(r"--(?:micro-)?batch \d+", str(error.value).split("give")[1]):
        plan.check(parse("", [*argv(**flags), *words.split()]))
    if fewer := re.search(r"--num_gpus (\d)", str(error.value)):
        monkeypatch.setenv("WORLD_SIZE", fewer[1])
        plan.check(parse("", argv(**flags)))


@pytest.mark.parametrize("size", [None, [128, 128]])
def test_a_unet_that_does_not_tell_its_size_is_refused(size, published, argv):
    file = published("sdxl") / "unet" / "config.json"
    file.write_text(json.dumps(architectures.SDXL | {"sample_size": size}))
    args = parse("", argv(model=file.parent.parent, resolution=1024))
    with pytest.raises(UserError, match=f"sample_size in its UNet's config.json is .*{size}"):
        plan.check(args)


# -------------------------------------------------------------------------------------------------
# The model card.


def card_of(argv: list[str]) -> dict:
    args = parse("", argv)
    return card.facts(args, plan.asked(args), lora.trains_adapters(args), 24, 1)


def test_the_card_names_the_unet_that_training_started_from(argv, checkpoint, tmp_path):
    base, other = checkpoint(), checkpoint("sdxl", "v_prediction")
    text = card.render(card_of(argv()), [])
    assert f"\n`{base}`, fine-tuned by" in text and "with the UNet" not in text
    assert "| seed | 0 |" in text and "| unet |" not in text
    start = f"`{base}` with the UNet of `{other}`"
    assert f"\n{start}, fine-tuned by" in card.render(card_of(argv(unet=other)), [])
    adapters = card_of(argv(unet=other, lora="x.safetensors", lora_start="merge", lora_rank=2))
    merged = f"LoRA adapters for {start} and with the LoRA `x.safetensors` merged into it, "
    assert merged in card.render(adapters, [])
    adapters = card_of(argv(lora_rank=2))
    assert f"LoRA adapters for the UNet of `{base}`, fine-tuned by" in card.render(adapters, [])


@pytest.mark.parametrize("text", ["a, b/c.parquet", "a: [b]", "# 'a' \"b\"", "- x\n---\ny: 1"])
def test_the_front_matter_of_the_card_holds_any_prompt_and_no_path(text, argv):
    record, widget = (
        card_of(argv(data=text, lora_rank=2)),
        {"text": text, "output": {"url": "a.png"}},
    )
    front = yaml.safe_load(card.render(record, [], [widget]).split("\n---\n")[0])
    assert front["widget"] == [widget] and not front.keys() & {"datasets", "base_model"}
    tags = ["inpo", "preference-alignment", "text-to-image", "lora", "template:sd-lora"]
    assert front["tags"] == tags and front["library_name"] == "diffusers"


@pytest.mark.parametrize("subfolder", [None, "unet"])
@pytest.mark.parametrize("merged", [False, True])
def test_the_lines_of_the_card_load_what_was_trained(subfolder, merged, argv, checkpoint, tmp_path):
    other, first, out = tmp_path / "other", tmp_path / "first", tmp_path / "run"
    unet = loading.load_unet(str(checkpoint()))
    with torch.no_grad():
        for weight in unet.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    unet.save_pretrained(other / (subfolder or "."))
    flags = {"unet": other, "lora_rank": 4, "steps": 1, "warmup": 0}
    if merged:
        train_inpo.main(argv(**flags, out=first))
        flags |= {"lora": first, "lora_start": "merge"}
    train_inpo.main(argv(**flags))

    expected = loading.load_pipeline(str(checkpoint()), unet=str(other))
    for path in [first] * merged + [out]:
        before = {key: value.clone() for key, value in expected.unet.state_dict().items()}
        loras.fuse_lora(expected, str(path))
        assert distance(expected.unet.state_dict(), before) > 1e-3
    [code] = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    names = {"FOLDER": str(out)}
    exec(code, names)
    names["pipeline"].fuse_lora()
    names["pipeline"].unload_lora_weights()
    assert distance(names["pipeline"].unet.state_dict(), expected.unet.state_dict()) < 1e-5


# -------------------------------------------------------------------------------------------------
# What the dry run accepts, the run accepts.


def refused(argv, dry: bool, **flags) -> str:
    """The sentence of the plan's check, which a dry run and a run share."""
    return refusal(plan.check, parse("", [*argv(**flags), *["--dry-run"] * dry]))


@pytest.mark.parametrize("dry", [True, False])
def test_data_of_which_a_sample_is_broken_are_refused_or_warned_about(dry, argv, pairs, tmp_path):
    table, source = pq.read_table(pairs), tmp_path / "spoiled.parquet"
    pictures = table["jpg_0"].to_pylist()

    def spoil(*rows):
        bad = [b"none" if i in rows else picture for i, picture in enumerate(pictures)]
        pq.write_table(table.set_column(0, "jpg_0", pa.array(bad)), source)

    spoil(4, 9)
    sentence = refused(argv, dry, data=source)
    assert sentence.startswith(f"--data {source}: 2 of 24 pairs are broken, more than --max-broken")
    assert f" of {source}: jpg_0: is no picture" in sentence
    spoil(9)
    args = parse("", [*argv(data=source), *["--dry-run"] * dry])
    (warning,) = plan.warnings(args, plan.check(args))
    assert warning.startswith(f"1 of 24 pairs are broken (row 9 (from 0) of {source}: jpg_0: is no")


def test_a_sample_refuses_only_what_chance_does_not_explain(argv):
    args = parse("", argv())
    plan.check_sample(args, 10**6, 64, ["row"] * 10)
    assert "11 of 64 pairs are broken" in refusal(plan.check_sample, args, 10**6, 64, ["x"] * 11)
    assert "4 of 64 pairs are broken" in refusal(plan.check_sample, args, 64, 64, ["x"] * 4)
    args.max_broken = 1
    plan.check_sample(args, 64, 64, ["row"] * 64)


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
@pytest.mark.parametrize("start", ["continue", "merge"])
def test_a_lora_that_does_not_fit_is_refused_before_weights_are_loaded(
    start, kind, dry, argv, checkpoint, tmp_path, monkeypatch
):
    rank = 2 if start == "merge" else 0
    flags = {"model": checkpoint(kind), "lora_start": start, "lora_rank": rank}
    other = loading.load_unet(str(checkpoint("sd15" if kind == "sdxl" else "sdxl")))
    for name, unet in {"fits": loading.load_unet(str(checkpoint(kind))), "another": other}.items():
        lora.attach(unet, 2, 2.0)
        lora.save(lora.trainable(unet), unet, tmp_path / name, "a title")
    (tmp_path / "no.safetensors").write_bytes(b"no")
    monkeypatch.setattr(loading, "load_pipeline", None)
    monkeypatch.setattr(loading, "load_unet", None)
    plan.check(parse("", [*argv(lora=tmp_path / "fits", **flags), *["--dry-run"] * dry]))
    for name, words in {"another": "does not fit", "no.safetensors": "cannot be read"}.items():
        sentence = refused(argv, dry, lora=tmp_path / name, **flags)
        assert sentence.startswith(f"The LoRA '{tmp_path / name}' {words}")


@pytest.mark.parametrize("name, module", [("wandb", "wandb"), ("comet", "comet_ml")])
def test_a_monitor_whose_library_is_lacking_is_refused(name, module, argv, ds_config, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    plan.check(parse("", argv(ds_config=ds_config(**{name: {"enabled": False}}))))
    config = ds_config(**{name: {"enabled": True}})
    sentence = refused(argv, True, ds_config=config)
    assert sentence.startswith(f"--ds-config {config}: {name} is enabled, and cannot be imported: ")
    assert module in sentence
    assert "must be an object" in refused(argv, True, ds_config=ds_config(**{name: True}))


def test_shared_memory_is_that_of_all_ranks_of_the_machine(argv, monkeypatch):
    """A batch of 2 pairs of 16 px takes 3,072 bytes; a loader of 2 workers has 5."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_200_000))
    plan.check(parse("", argv(workers=2)))
    plan.check(parse("", argv(workers=0, resolution=1024)))
    assert "need 63 MB of shared memory" in refused(argv, True, workers=2, resolution=1024)
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun's, DeepSpeed's
        monkeypatch.setenv(variable, "80")
        assert "and /dev/shm has 1 MB free" in refused(argv, True, workers=2)
        monkeypatch.delenv(variable)


@pytest.mark.parametrize("name, size", [("zero3-offload", 20), ("zero2-offload", 18)])
def test_the_plan_says_how_much_main_memory_offload_takes(name, size, argv, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    flags = {"ds_config": f"configs/{name}.json", "lr": 1e-5}
    for more in ({}, {"lora_rank": 4}):
        args = parse("", argv(**flags, **more))
        found = plan.check(args)
        rank = args.lora_rank
        trained = lora.parameters(found.unet_config, rank, "attention") if rank else None
        gib = budget.host_memory(trained or found.parameters, plan.read_ds_config(args.ds_config))
        assert gib == pytest.approx(size * (trained or found.parameters) / 2**30)
        assert f"; {gib:.0f} GiB of main memory" in plan.memory_in_words(args, found)
    plain = parse("", argv())
    assert "main memory" not in plan.memory_in_words(plain, plan.check(plain))
