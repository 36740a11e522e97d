"""Single files: models in the original layout, read, trained, exported and read again."""

import argparse
import json
import types

import diffusers
import pytest
import torch
from conftest import refusal, untimed
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from original import tensors, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
import model
import train_inpo
from lab import architectures
from system import hub, single
from system.files import ROOT
from training import export, preview
from weights import loading, original
from weights.loading import load_pipeline
from weights.modules import modules_of

# -------------------------------------------------------------------------------------------------
# The layout.


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_the_export_at_full_size_has_exactly_the_published_names_and_shapes(name):
    with torch.device("meta"):
        modules = architectures.modules(name)
    found = {key: tuple(x.shape) for key, x in original.tensors_of(modules, name).items()}
    lines = (ROOT / "tests" / "original_layout" / f"{name}.txt").read_text().splitlines()
    published = [line.split(" ", 1) for line in lines if not line.startswith("#")]
    published = [(key, size[0] if size else "") for key, *size in published]
    assert len(published) == {"sdxl": 2515, "sd15": 1131}[name]
    assert found == {key: tuple(map(int, filter(None, size.split("x")))) for key, size in published}


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_what_is_written_is_the_table_by_hand(kind, checkpoint, tmp_path):
    pipeline = load_pipeline(str(checkpoint(kind)))
    original.save(pipeline, kind, tmp_path / "it.safetensors", torch.float32, "it")
    found, expected = load_file(tmp_path / "it.safetensors"), tensors(pipeline)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("logit_scale"):
            assert found[name].exp() == pytest.approx(100)
        else:
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    with safe_open(tmp_path / "it.safetensors", "pt") as opened:
        said = opened.metadata()
    assert said["modelspec.prediction_type"] == "epsilon" and said["modelspec.title"] == "it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_a_single_file_is_the_pipeline_that_it_was_made_of(kind, dtype, checkpoint, tmp_path):
    folder = str(checkpoint(kind))
    expected = load_pipeline(folder).to(dtype).to(torch.float32)
    file = str(write(tmp_path / "it.safetensors", expected, dtype))
    said(file, config=folder)
    assert (hub.kind(file), hub.architecture(file)) == ("pipeline", kind)
    found = loading.load_any(file)
    assert model.identity(found) == model.identity(expected)
    assert type(found.scheduler) is type(expected.scheduler)
    half = load_pipeline(file, dtype=torch.bfloat16)
    assert model.identity(half) == model.identity(load_rounded(expected, folder))


def load_rounded(pipeline, folder: str):
    """The pipeline as load_pipeline(dtype=bfloat16) has it."""
    found = load_pipeline(folder, dtype=torch.bfloat16)
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            getattr(found, part).load_state_dict(module.state_dict())
    return found


def said(name: str, config=None, prediction_type=None, zero_snr=False):
    flags = dict(config=config, prediction_type=prediction_type, zero_snr=zero_snr)
    hub.say(name, types.SimpleNamespace(**flags))


# -------------------------------------------------------------------------------------------------
# What a file says of its noise schedule, and what flags say.


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_the_markers_of_a_file_are_honoured_and_written(kind, checkpoint, tmp_path):
    folder, empty = str(checkpoint(kind)), torch.empty(0)
    base = load_pipeline(folder)
    file = str(write(tmp_path / "v.safetensors", base, v_pred=empty, ztsnr=empty))
    said(file, config=folder)
    found = load_pipeline(file)
    config = found.scheduler.config
    assert config.prediction_type == "v_prediction" and config.timestep_spacing == "trailing"
    betas = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler").betas
    expected = (1 - rescale_zero_terminal_snr(betas)).cumprod(0)
    torch.testing.assert_close(model.alphas_cumprod(found), expected, atol=2e-7, rtol=0)
    assert loading.read_scheduler(file).config == config
    original.save(found, kind, tmp_path / "again.safetensors", torch.float32, "again")
    assert single.scheduler_of(tmp_path / "again.safetensors") == single.scheduler_of(file)
    original.save(base, kind, tmp_path / "plain.safetensors", torch.float32, "plain")
    plain = load_file(tmp_path / "plain.safetensors")
    assert not {"v_pred", "ztsnr"} & plain.keys()
    assert single.scheduler_of(tmp_path / "plain.safetensors") == {"prediction_type": "epsilon"}


def test_the_metadata_of_a_file_count_where_there_are_no_markers(checkpoint, tmp_path):
    found = tensors(load_pipeline(str(checkpoint())))
    file = tmp_path / "it.safetensors"
    for said_there, expected in (("v", "v_prediction"), ("epsilon", "epsilon"), ("odd", None)):
        save_file(found, file, metadata={"modelspec.prediction_type": said_there})
        assert single.scheduler_of(file).get("prediction_type") == expected


def test_flags_say_what_files_do_not_and_of_a_folder_too(checkpoint, tmp_path):
    folder = str(checkpoint())
    file = str(write(tmp_path / "it.safetensors", load_pipeline(folder)))
    for name, config in ((file, folder), (folder, None)):
        said(name, config, "v_prediction", zero_snr=True)
        there = load_pipeline(name).scheduler.config
        assert (there.prediction_type, there.rescale_betas_zero_snr) == ("v_prediction", True)
        said(name, config)
        there = load_pipeline(name).scheduler.config
        assert (there.prediction_type, there.rescale_betas_zero_snr) == ("epsilon", False)


def test_of_several_models_flags_mean_the_files_that_say_nothing(checkpoint, tmp_path):
    folder, base = str(checkpoint()), load_pipeline(str(checkpoint()))
    mute = str(write(tmp_path / "mute.safetensors", base))
    speaks = str(write(tmp_path / "speaks.safetensors", base, v_pred=torch.empty(0)))
    flags = argparse.Namespace(config=folder, prediction_type="epsilon", zero_snr=True)
    hub.say_of_files([folder, mute, speaks], flags)
    kinds = [load_pipeline(name).scheduler.config for name in (folder, mute, speaks)]
    assert [one.prediction_type for one in kinds] == ["epsilon", "epsilon", "v_prediction"]
    assert [one.rescale_betas_zero_snr for one in kinds] == [False, True, False]
    assert "--config: no model here is a single" in refusal(hub.say_of_files, [folder], flags)
    flags.config = None
    assert "--prediction-type: no model" in refusal(hub.say_of_files, [speaks], flags)


def test_the_configuration_is_that_of_the_first_release_unless_named(checkpoint, tmp_path, on_hub):
    pipeline = load_pipeline(str(checkpoint()))
    file = str(write(tmp_path / "it.safetensors", pipeline))
    hub.SAID.clear()
    assert hub.layout_of(file) == hub.PRESETS["sdxl"]
    sentence = refusal(load_pipeline, file)
    assert "is a single file; its configuration is read from 'stabilityai" in sentence
    assert "--config names" in sentence and "the hub cannot be reached" in sentence
    said(file, config=on_hub(checkpoint()))  # of which only the configurations are needed
    for weights in (tmp_path / "cache").rglob("*.safetensors"):
        weights.unlink()
    assert model.identity(load_pipeline(file)) == model.identity(pipeline)


# -------------------------------------------------------------------------------------------------
# Mistakes.

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
MISTAKES = {  # tensors in place of the file's, None: without; words of the sentence
    "a UNet alone": (dict.fromkeys(["conditioner", "first_stage"]), "no text encoder of SDXL"),
    "no VAE": (dict.fromkeys(["first_stage"]), "lacks the vae (first_stage_model.*)"),
    "no second encoder": (dict.fromkeys(["conditioner.embedders.1"]), "lacks the text_encoder_2"),
    "for inpainting": ({FIRST: torch.zeros(16, 9, 3, 3)}, "reads 9 channels, as one for inpaint"),
    "a weight is missing": (dict.fromkeys([f"{single.UNET}out.2.bias"]), "it lacks weights."),
    "of another size": ({FIRST: torch.zeros(8, 4, 3, 3)}, "does not fit the configuration of"),
    "one too many": ({f"{single.UNET}input_blocks.9.0.bias": torch.zeros(7)}, "have a place"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_file_that_is_not_whole_is_refused_in_one_sentence(case, checkpoint, tmp_path):
    changed, words = MISTAKES[case]
    found = tensors(load_pipeline(str(checkpoint())))
    for start, tensor in changed.items():
        found = {k: x for k, x in found.items() if not k.startswith(start)}
        found |= {} if tensor is None else {start: tensor}
    save_file(found, tmp_path / "it.safetensors")

    def load(name: str):
        said(name, config=str(checkpoint()))
        load_pipeline(name)

    sentence = refusal(load, str(tmp_path / "it.safetensors"))
    assert words in sentence and str(tmp_path / "it.safetensors") in sentence


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_file_that_is_cut_short_is_said(left, checkpoint, tmp_path):
    file = write(tmp_path / "it.safetensors", load_pipeline(str(checkpoint())))
    file.write_bytes(file.read_bytes()[:left])
    sentence = refusal(load_pipeline, str(file))
    assert sentence.startswith(f"'{file}' is no whole .safetensors file (")


def test_a_configuration_of_another_kind_or_for_a_folder_is_refused(checkpoint, tmp_path):
    file = str(write(tmp_path / "it.safetensors", load_pipeline(str(checkpoint()))))
    other = str(checkpoint("sd15"))
    assert f"--config {other}: is not of sdxl" in refusal(said, file, config=other)
    assert "has its own; leave the flag out" in refusal(said, other, config=str(checkpoint()))


def test_a_weight_that_overflows_is_said(checkpoint, tmp_path):
    pipeline = load_pipeline(str(checkpoint()))
    pipeline.unet.conv_in.bias.data[0] = 1e6
    sentence = refusal(
        original.save, pipeline, "sdxl", tmp_path / "it.safetensors", torch.float16, "it"
    )
    assert "input_blocks.0.0.bias overflows" in sentence


# -------------------------------------------------------------------------------------------------
# The whole way: train on a file, export to a file, read that file here and in diffusers.


ALL = ["sdxl-v_prediction", "sd15-epsilon"]
ALL += [
    pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl-epsilon", "sd15-v_prediction")
]


@pytest.fixture(scope="module", params=ALL)
def trained(request, checkpoint, command, tmp_path_factory):
    """(kind, prediction, file, folder of a run of two steps that started from that file)."""
    kind, prediction = request.param.split("-")
    root, folder = tmp_path_factory.mktemp("trained"), str(checkpoint(kind, prediction))
    marker = {"v_pred": torch.empty(0)} if prediction == "v_prediction" else {}
    file = write(root / "my model.safetensors", load_pipeline(folder), torch.float16, **marker)
    flags = {"model": file, "config": folder, "checkpoint_every": 1, "sample_every": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "STEPS", 2)
        train_inpo.main(command(root / "run", **flags))
    return kind, prediction, file, root / "run"


def export_to(run, out, *flags) -> str:
    """The only single file of an export."""
    export.main([str(run), "--to=single-file", f"--out={out}", *flags])
    (file,) = out.glob("*.safetensors")
    return str(file)


def test_a_run_that_started_from_a_file_is_that_of_its_pipeline(
    trained, checkpoint, command, tmp_path
):
    kind, prediction, file, run = trained
    half = load_pipeline(str(checkpoint(kind, prediction))).to(torch.float16).to(torch.float32)
    half.save_pretrained(tmp_path / "half")
    train_inpo.main(command(tmp_path / "run", model=tmp_path / "half"))
    assert untimed(tmp_path / "run") == untimed(run)
    assert len(list((run / "samples").glob("step_*.png"))) == 2


def test_an_export_read_again_is_the_pipeline_of_the_run(trained, tmp_path, capsys):
    kind, prediction, file, run = trained
    name = export_to(run, tmp_path / "fp32", "--dtype=fp32")
    assert name.endswith("my model-inpo.safetensors")
    assert "models/checkpoints of ComfyUI" in capsys.readouterr().out
    said(name, config=str(run))
    expected = load_pipeline(str(run))
    found = load_pipeline(name)
    assert model.identity(found) == model.identity(expected)
    assert found.scheduler.config.prediction_type == prediction
    pictures = [
        model.sample(one, ["a red circle"], [3], steps=2, guidance=2.0)[0]
        for one in (found, expected)
    ]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    half = load_file(export_to(run, tmp_path / "fp16"))  # which is the default
    for key, weight in load_file(name).items():
        rounded = weight.half() if weight.is_floating_point() and weight.numel() else weight
        assert torch.equal(half[key], rounded), key
    evaluated = tmp_path / "evaluated"
    models = [f"base={file}", f"aligned={name}"]
    flags = ["--prompts", str(tmp_path / "two.txt"), "--scorers", "none", "--steps", "2"]
    (tmp_path / "two.txt").write_text("a red circle\na blue circle\n")
    where = ["--config", str(run), "--guidance", "2", "--out", str(evaluated)]
    evaluate.main(["--models", *models, *flags, *where])
    manifest = json.loads((evaluated / "images/two/aligned/manifest.json").read_text())
    assert manifest["identity"] == model.identity(expected)


def test_diffusers_reads_the_export_as_the_same_pipeline(trained, tmp_path):
    """By its whole-pipeline reader. It takes one text encoder for the other where both are equally
    wide, as those of the small checkpoints are: they are given."""
    kind, prediction, _, run = trained
    name = export_to(run, tmp_path / "out", "--dtype=fp32")
    names = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline"}
    expected = getattr(diffusers, names[kind]).from_pretrained(run)
    text = {k: x for k, x in expected.components.items() if kind == "sdxl" and "text_enc" in k}
    found = getattr(diffusers, names[kind]).from_single_file(name, config=str(run), **text)
    for part, module in modules_of(expected).items():
        there = getattr(found, part).state_dict()
        assert module.state_dict().keys() == there.keys()
        assert all(torch.equal(there[key], x) for key, x in module.state_dict().items()), part
    call = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "np"}
    images = [
        one(generator=torch.Generator().manual_seed(0), **call).images for one in (found, expected)
    ]
    assert (images[0] == images[1]).all()


def test_a_lora_that_started_from_a_file_is_exported_merged(trained, command, checkpoint, tmp_path):
    kind, prediction, file, _ = trained
    flags = {"model": file, "config": checkpoint(kind, prediction), "checkpoint_every": 2}
    train_inpo.main(command(tmp_path / "run", **flags, lora_rank=2))
    name = export_to(tmp_path / "run", tmp_path / "out", "--dtype=fp32")
    export.main([str(tmp_path / "run"), "--to=pipeline", f"--out={tmp_path / 'merged'}"])
    said(name, config=str(flags["config"]))
    merged = load_pipeline(str(tmp_path / "merged"))
    assert model.identity(load_pipeline(name)) == model.identity(merged)
    card = (tmp_path / "run" / "README.md").read_text()
    assert f'from_single_file("{file}")' in card
