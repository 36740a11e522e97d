"""Laws of model.py, on small random checkpoints of both architectures.

The references are diffusers' own: its pipelines' __call__, schedulers and loaders."""

import json
import pickle
import shutil
from pathlib import Path

import diffusers
import peft
import pytest
import torch
import transformers
from conftest import small_disk
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file

import model
from lab import pretrain
from model import load_pipeline
from system import hub
from system.files import UserError

SIZE, CAPTIONS = 16, ["a red circle on a white background", "zebra", "a blue cross"]
KINDS = {
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd15": diffusers.StableDiffusionPipeline,
}
both = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def copy(checkpoint, tmp_path):
    """copy(kind) -> a folder of its own that a test may spoil."""
    return lambda kind="sdxl": shutil.copytree(checkpoint(kind), tmp_path / kind)


def edit(file, **entries):
    """Change entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def other_unet(folder):
    """The weights of a pipeline's UNet, every one of them changed."""
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return {name: 0.9 * w + 0.01 for name, w in weights.items()}


def write_unet(folder, weights, into):
    """Save the pipeline's UNet with other weights as a checkpoint of its own."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    unet.load_state_dict(weights)
    unet.save_pretrained(into)


def same(left, right):
    """Whether two state dicts, or nested conditionings, hold the same tensors and dtypes."""
    assert left.keys() == right.keys()
    return all(
        same(left[key], right[key])
        if isinstance(left[key], dict)
        else left[key].dtype == right[key].dtype and torch.equal(left[key], right[key])
        for key in left
    )


def levels(left, right):
    """Largest difference of two lists of pictures, in levels of 0..255."""
    to_tensor = diffusers.image_processor.VaeImageProcessor.pil_to_numpy
    return abs(to_tensor(left) - to_tensor(right)).max() * 255


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# -------------------------------------------------------------------------------------------------
# Load.


@both
def test_architecture_and_configurations_are_read_from_the_folder(checkpoint, kind):
    folder = checkpoint(kind)
    assert hub.architecture(str(folder)) == kind
    for part in ("unet", "vae", "scheduler"):
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        written = json.loads((folder / part / file).read_text())
        assert hub.read_config(str(folder), part) == written
    assert hub.read_config(str(folder / "unet"), "unet")["sample_size"] == 8
    assert hub.read_config(str(folder / "vae"), "vae")["block_out_channels"] == [8, 16]


@both
def test_parameters_are_counted_without_weights(checkpoint, kind):
    config = hub.read_config(str(checkpoint(kind)), "unet")
    weights = load_file(checkpoint(kind) / "unet" / "diffusion_pytorch_model.safetensors")
    assert model.count_parameters(config) == sum(w.numel() for w in weights.values())


def test_the_published_sd15_unet_has_860_million_parameters():
    config = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
    assert model.count_parameters(config) == 859_520_964


@both
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_loaded_pipeline_is_the_stored_one_ready_for_inference(checkpoint, kind, prediction):
    pipeline = load_pipeline(str(checkpoint(kind, prediction)))
    reference = KINDS[kind].from_pretrained(checkpoint(kind, prediction))
    assert type(pipeline) is KINDS[kind]
    assert pipeline.scheduler.config.prediction_type == prediction
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        part = getattr(pipeline, name, None)
        if part is not None:
            assert same(part.state_dict(), getattr(reference, name).state_dict())
            assert not part.training and not any(p.requires_grad for p in part.parameters())


def missing(folder):
    return str(folder / "nowhere")


def unknown(folder):
    return "sdxxl"


def on_the_hub_only(folder):
    return "owner/absent-model"


def no_pipeline(folder):
    (folder / "model_index.json").unlink()
    return str(folder)


def another_class(folder):
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    return str(folder)


def no_class(folder):
    (folder / "model_index.json").write_text("{}")
    return str(folder)


def broken_index(folder):
    (folder / "model_index.json").write_text("{")
    return str(folder)


def no_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return str(folder)


def no_vae(folder):
    shutil.rmtree(folder / "vae")
    return str(folder)


def no_text_weights(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()
    return str(folder)


def truncated_text_weights(folder):
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return str(folder)


def flow_matching(folder):
    name = "FlowMatchEulerDiscreteScheduler"
    edit(folder / "model_index.json", scheduler=["diffusers", name])
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    return str(folder)


def sample_prediction(folder):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    return str(folder)


MISTAKES = {
    missing: "Unknown diffusers pipeline",
    unknown: "use sdxl, sd15, tiny, a folder in diffusers layout, or a hub id",
    on_the_hub_only: "the hub cannot be reached",
    no_pipeline: "it has no model_index.json",
    another_class: "is a FluxPipeline; StableDiffusionXLPipeline and StableDiffusionPipeline can",
    no_class: "is a pipeline without a class; StableDiffusionXLPipeline",
    broken_index: "Cannot read the pipeline",
    no_weights: "it has no unet/diffusion_pytorch_model.safetensors or ",
    no_vae: "it has no vae/config.json",
    no_text_weights: "it has no text_encoder/model.safetensors or text_encoder/pytorch_model.bin",
    truncated_text_weights: "Cannot load the text_encoder",
    flow_matching: "has a FlowMatchEulerDiscreteScheduler, which knows no alphas_cumprod.",
    sample_prediction: "predicts 'sample'; epsilon and v_prediction can be trained here.",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_the_model_is_one_sentence_that_names_it(copy, mistake):
    name = mistake(copy())
    with pytest.raises(UserError) as error:
        load_pipeline(name)
    sentence = str(error.value)
    assert f"'{name}'" in sentence and MISTAKES[mistake] in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_mistake_in_a_replaced_part_is_one_sentence_that_names_it(checkpoint, copy, part):
    empty = copy("sd15")
    shutil.rmtree(empty / part)
    for name, words in {
        "nothing": f"Unknown {part} checkpoint or pipeline",
        str(empty): f"it has no {part}/config.json",
        "owner/absent-model": f"Cannot load the {part}",
    }.items():
        with pytest.raises(UserError) as error:
            load_pipeline(str(checkpoint("sdxl")), **{part: name})
        assert f"'{name}'" in str(error.value) and words in str(error.value)
        assert "\n" not in str(error.value)


def test_a_unet_that_reads_other_text_is_refused(checkpoint, tmp_path):
    sdxl, sd15 = checkpoint("sdxl"), checkpoint("sd15")
    config = diffusers.UNet2DConditionModel.load_config(sdxl, subfolder="unet")
    unpooled = diffusers.UNet2DConditionModel.from_config(config, addition_embed_type=None)
    unpooled.save_pretrained(tmp_path)  # of the right width
    for folder, unet in [(sdxl, sd15), (sd15, sdxl), (sdxl, tmp_path)]:
        with pytest.raises(UserError, match="does not read the text of") as error:
            load_pipeline(str(folder), unet=str(unet))
        assert f"'{unet}'" in str(error.value) and f"'{folder}'" in str(error.value)


@both
@pytest.mark.parametrize("layout", ["pipeline", "unet subfolder", "unet root"])
def test_a_unet_is_taken_from_any_layout(checkpoint, copy, tmp_path, kind, layout):
    folder, weights = checkpoint(kind), other_unet(checkpoint(kind))
    if layout == "pipeline":
        source = copy(kind)
        write_unet(folder, weights, source / "unet")
    else:
        source = tmp_path / "policy"
        write_unet(folder, weights, source / "unet" if "subfolder" in layout else source)
    pipeline = load_pipeline(str(folder), unet=str(source))
    assert same(pipeline.unet.state_dict(), weights)
    assert same(model.load_unet(str(source)).state_dict(), weights)
    assert not same(load_pipeline(str(folder)).unet.state_dict(), weights)


def test_a_vae_is_taken_from_another_checkpoint_with_its_precision(checkpoint, copy):
    fixed = copy("sd15")
    edit(fixed / "vae" / "config.json", force_upcast=False, scaling_factor=0.5)
    for source in (fixed, fixed / "vae"):  # a pipeline, and a VAE alone
        pipeline = load_pipeline(str(checkpoint("sdxl")), vae=str(source), dtype=torch.bfloat16)
        assert pipeline.vae.config.scaling_factor == 0.5
        exact = load_pipeline(str(fixed)).vae
        assert same(pipeline.vae.state_dict(), exact.to(torch.float16).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind, overflows, expected",
    [
        ("sdxl", True, torch.float32),
        ("sdxl", False, torch.float16),
        ("sd15", True, torch.float16),
        ("sd15", False, torch.float16),
    ],
)
def test_in_half_precision_the_vae_takes_fp16_unless_it_overflows(
    copy, dtype, kind, overflows, expected
):
    folder = copy(kind)
    edit(folder / "vae" / "config.json", force_upcast=overflows)
    pipeline = load_pipeline(str(folder), dtype=dtype)
    exact = load_pipeline(str(folder)).vae
    assert same(pipeline.vae.state_dict(), exact.to(expected).state_dict())  # rounded once at most
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == dtype
    if kind == "sdxl":
        assert pipeline.text_encoder_2.dtype == dtype


def test_in_fp32_every_part_is_fp32(checkpoint):
    pipeline = load_pipeline(str(checkpoint("sd15")))
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}


# -------------------------------------------------------------------------------------------------
# Anything that NAME=PATH of an evaluation points at.


def draw(pipeline):
    return model.sample(pipeline, CAPTIONS, [5, 6, 7], 2, 4.0)


def refusal(action, *arguments, **options):
    """The one sentence of a UserError."""
    with pytest.raises(UserError) as error:
        action(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_lora(folder, into, alpha=8.0, metadata=True, kohya=False, text=True, change=None):
    """A random LoRA of rank 4 for a pipeline, by peft and diffusers; change(weights) -> weights."""
    cls = KINDS[hub.architecture(str(folder))]
    pipeline = cls.from_pretrained(folder)
    torch.manual_seed(1)
    layers = {}
    for part, targets in {"unet": ["to_q", "to_k", "conv1"], "text_encoder": ["v_proj"]}.items():
        if part == "unet" or text:
            module = getattr(pipeline, part)
            config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
            config.lora_alpha = alpha
            module.add_adapter(config)
            layers[f"{part}_lora_layers"] = peft.get_peft_model_state_dict(module)
            if metadata:
                layers[f"{part}_lora_adapter_metadata"] = config.to_dict()
    cls.save_lora_weights(into, **layers)
    file = Path(into) / hub.LORA
    weights = load_file(file)
    if change or kohya:
        weights = change(weights) if change else weights
        if kohya:
            weights = as_kohya(weights, alpha)
        save_file(weights, file)
    return file, weights


def as_kohya(weights, alpha):
    """The keys of another trainer, which keeps alpha in the file."""
    renamed = {}
    for key, weight in weights.items():
        place, end = key.split(".lora_")
        place = "lora_" + place.replace(".", "_")
        renamed[f"{place}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = weight
        renamed[f"{place}.alpha"] = torch.tensor(alpha)
    return renamed


def hand_made(folder, lora, scale):
    """The pipeline with W + scale B A for every pair of a LoRA."""
    pipeline = load_pipeline(str(folder))
    for key, B in lora.items():
        if ".lora_B." in key:
            A, (part, name) = lora[key.replace("lora_B", "lora_A")], key.split(".", 1)
            weight = getattr(pipeline, part).get_submodule(name.split(".lora_B")[0]).weight
            weight += scale * (B.flatten(1) @ A.flatten(1)).reshape(weight.shape)
    return pipeline


def assert_same_weights(left, right, **tolerance):
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(left, part, None) is not None:
            ours, theirs = getattr(left, part).state_dict(), getattr(right, part).state_dict()
            assert ours.keys() == theirs.keys()
            for key in ours:
                torch.testing.assert_close(ours[key], theirs[key], **tolerance)


@pytest.fixture
def on_hub(monkeypatch, tmp_path):
    """hub(folder) -> a hub id whose files are in the cache, as they are once downloaded."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def add(folder, commit="f00d" * 10):
        repository = tmp_path / "cache" / f"models--owner--{Path(folder).name}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        return f"owner/{Path(folder).name}"

    return add


@both
def test_the_kind_of_a_model_is_decided_by_the_files_it_has(checkpoint, tmp_path, hub, kind):
    unet = checkpoint(kind) / "unet"
    shutil.copytree(unet, tmp_path / "within" / "unet")  # as the published SDXL and SD1.5 UNets
    (tmp_path / "within" / "README.md").write_text("A UNet.")
    shutil.copytree(unet, tmp_path / "root")
    shutil.copytree(unet, tmp_path / "both" / "unet")
    write_lora(checkpoint(kind), tmp_path / "both")
    write_lora(checkpoint(kind), tmp_path / "adapter")
    whole = shutil.copytree(checkpoint(kind), tmp_path / "whole")
    (whole / hub.LORA).write_bytes(b"")
    for name, expected in {
        "whole": "pipeline",
        "within": "unet",
        "root": "unet",
        "both": "unet",
        "adapter": "lora",
    }.items():
        assert hub.kind(str(tmp_path / name)) == hub.kind(hub(tmp_path / name)) == expected
    assert hub.kind(str(tmp_path / "adapter" / hub.LORA)) == "lora"
    assert hub.kind("tiny") == "pipeline"


def test_the_hub_is_asked_for_the_files_in_order_and_for_no_more(monkeypatch):
    asked, held = [], set()

    def download(path, file):
        asked.append(file)
        if file not in held:
            raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError, "404")
        return file

    monkeypatch.setattr(model, "hf_hub_download", download)
    files = ["model_index.json", "unet/config.json", "config.json", hub.LORA]
    for i, expected in enumerate(["pipeline", "unet", "unet", "lora"]):
        asked.clear()
        held |= {files[-1], files[i]}
        assert hub.kind("owner/name") == expected
        assert asked == files[: i + 1]
        held.clear()
    sentence = refusal(hub.kind, "owner/name")
    assert sentence.startswith(
        "'owner/name' is not a pipeline, UNet or LoRA: it has no model_index"
    )
    assert hub.LORA in sentence


def test_a_hub_that_cannot_be_reached_is_not_taken_for_one_without_the_file(monkeypatch):
    def download(path, file):
        missing = RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError, "404")
        raise LocalEntryNotFoundError("no connection") if "unet" in file else missing

    monkeypatch.setattr(model, "hf_hub_download", download)
    for action in (hub.kind, model.load_any):
        sentence = refusal(action, "owner/name")
        assert "'owner/name': the hub cannot be reached; check the network" in sentence


@both
@pytest.mark.parametrize("layout", ["root", "within", "hub root", "hub within"])
def test_a_unet_alone_draws_what_the_pipeline_with_it_draws(
    checkpoint, copy, tmp_path, hub, layout, kind
):
    whole, alone = copy(kind), tmp_path / "alone"
    write_unet(whole, other_unet(whole), whole / "unet")
    shutil.copytree(whole / "unet", alone / "unet" if "within" in layout else alone)
    found = model.load_any(hub(alone) if "hub" in layout else str(alone), str(checkpoint(kind)))
    expected = model.load_any(str(whole))
    assert levels(draw(found), draw(expected)) == 0
    assert levels(draw(found), draw(load_pipeline(str(checkpoint(kind))))) > 0
    assert model.identity(found) == model.identity(expected)


def test_what_is_loaded_has_the_precision_asked_for_and_is_ready_for_inference(
    checkpoint, tmp_path
):
    base = str(checkpoint("sdxl"))
    file, _ = write_lora(base, tmp_path)
    for path in (base, f"{base}/unet", str(file)):
        pipeline = model.load_any(path, base, torch.bfloat16)
        reference = load_pipeline(base, dtype=torch.bfloat16)
        for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            ours, theirs = getattr(pipeline, part), getattr(reference, part)
            assert ours.dtype == theirs.dtype and not ours.training
            assert not any(p.requires_grad for p in ours.parameters())
            assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_the_pipeline_around_a_path_is_itself_or_the_base(checkpoint, tmp_path):
    whole = str(checkpoint("sd15"))
    file, _ = write_lora(whole, tmp_path)
    assert model.pipeline_of(whole, None) == model.pipeline_of(whole, "other") == whole
    for alone in (f"{whole}/unet", str(file), str(tmp_path)):
        assert model.pipeline_of(alone, "other") == "other"
        for action in (model.pipeline_of, model.load_any):
            sentence = refusal(action, alone, None)
            assert f"'{alone}'" in sentence and "name one with --base" in sentence


@both
@pytest.mark.parametrize("written", ["with alpha", "without alpha", "by another trainer"])
def test_a_lora_is_alpha_over_r_times_b_a_added_to_the_weights(checkpoint, tmp_path, kind, written):
    base, kohya = checkpoint(kind), written == "by another trainer"
    options = dict(metadata=written == "with alpha", text=not kohya)
    _, lora = write_lora(base, tmp_path / "a", **options)
    file, _ = write_lora(base, tmp_path / "b", **options, kohya=kohya)
    found = model.load_any(str(file), str(base))
    expected = hand_made(base, lora, 1.0 if written == "without alpha" else 8.0 / 4)
    assert_same_weights(found, expected, rtol=1e-5, atol=1e-6)
    assert levels(draw(found), draw(expected)) <= 1
    assert levels(draw(found), draw(load_pipeline(str(base)))) > 5


@both
def test_a_lora_draws_what_it_draws_as_an_adapter_of_diffusers(checkpoint, tmp_path, kind, hub):
    base = str(checkpoint(kind))
    write_lora(base, tmp_path / "lora")
    theirs = load_pipeline(base)
    theirs.load_lora_weights(tmp_path / "lora", weight_name=hub.LORA)
    for path in (str(tmp_path / "lora"), hub(tmp_path / "lora")):
        assert levels(draw(model.load_any(path, base)), draw(theirs)) <= 1


def test_a_lora_of_scale_0_changes_nothing(checkpoint, tmp_path):
    base = str(checkpoint("sdxl"))
    write_lora(base, tmp_path, alpha=0.0)
    found, expected = model.load_any(str(tmp_path), base), load_pipeline(base)
    assert levels(draw(found), draw(expected)) == 0
    assert model.identity(found) == model.identity(expected)


def test_a_lora_in_half_precision_is_near_that_in_fp32(checkpoint, tmp_path):
    base = str(checkpoint("sd15"))
    file, lora = write_lora(base, tmp_path)
    found = model.load_any(str(file), base, torch.float16).to(torch.float32)
    assert_same_weights(found, hand_made(base, lora, 2.0), rtol=2e-3, atol=2e-3)


def stray(weights):
    place = "unet.down_blocks.9.attentions.0.to_q"
    A, B = torch.zeros(4, 32), torch.zeros(32, 4)
    return weights | {f"{place}.lora_A.weight": A, f"{place}.lora_B.weight": B}


def stray_text(weights):
    place = "text_encoder.encoder.layers.77.self_attn.q_proj"
    A, B = torch.zeros(4, 16), torch.zeros(16, 4)
    return weights | {f"{place}.lora_A.weight": A, f"{place}.lora_B.weight": B}


def halved(weights):
    return {key: w for key, w in weights.items() if key != min(k for k in weights if "_B" in k)}


def of_another_model(weights):
    return {key.replace("unet.", "transformer."): weight for key, weight in weights.items()}


def dora(weights):
    key = min(key for key in weights if "unet" in key and "_A" in key)
    return weights | {key.replace("lora_A.weight", "dora_scale"): torch.ones(16)}


def misshapen(weights):
    return {key: w[:, 1:].contiguous() if "_A" in key else w for key, w in weights.items()}


def undefined(weights):
    return {key: weight / 0 for key, weight in weights.items()}


def whole_unet(weights):
    return {"conv_in.weight": torch.zeros(2)}


MISFITS = {
    stray: "unet.down_blocks.9.attentions.0.to_q.lora_A.weight has no counterpart",
    stray_text: "text_encoder.encoder.layers.77.self_attn.q_proj.lora_A.weight has no counterpart",
    halved: ".lora_B.weight has no counterpart",
    of_another_model: "transformer.down_blocks.",
    dora: ".dora_scale has no counterpart",
    misshapen: "size mismatch for down_blocks.",
    undefined: "NaN",
    whole_unet: "Invalid LoRA checkpoint",
}


@pytest.mark.parametrize("misfit", MISFITS, ids=lambda misfit: misfit.__name__)
def test_a_lora_that_does_not_fit_is_refused_with_a_key(checkpoint, tmp_path, misfit):
    base = str(checkpoint("sdxl"))
    file, _ = write_lora(base, tmp_path, change=misfit)
    sentence = refusal(model.load_any, str(file), base)
    assert sentence.startswith(f"The LoRA '{file}' does not fit '{base}': ")
    assert MISFITS[misfit] in sentence


def test_a_stray_key_of_another_trainer_is_named_as_it_wrote_it(checkpoint, tmp_path):
    base = str(checkpoint("sdxl"))
    file, _ = write_lora(base, tmp_path, text=False, kohya=True, change=stray)
    sentence = refusal(model.load_any, str(file), base)
    assert "lora_unet_down_blocks_9_attentions_0_to_q.lora_down.weight has no count" in sentence


@pytest.mark.parametrize("kinds", [("sdxl", "sd15"), ("sd15", "sdxl")], ids="-in-".join)
def test_a_lora_or_unet_of_another_architecture_is_refused(checkpoint, tmp_path, kinds):
    made_for, base = map(checkpoint, kinds)
    file, _ = write_lora(made_for, tmp_path)
    sentence = refusal(model.load_any, str(file), str(base))
    assert "does not fit" in sentence and "attn2.to_k.lora_A" in sentence
    assert "does not read the text of" in refusal(model.load_any, f"{made_for}/unet", str(base))


@pytest.mark.parametrize(
    "path",
    ["nowhere", "nowhere.safetensors", "out/nowhere.safetensors", "notes.md", "out/notes.md"],
)
def test_a_path_to_nothing_or_to_another_file_is_not_looked_up_on_the_hub(
    tmp_path, monkeypatch, path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for notes in ("notes.md", "out/notes.md"):
        (tmp_path / notes).write_text("")
    assert refusal(hub.kind, path).startswith(f"Unknown pipeline, UNet or LoRA '{path}': use sdxl")


def test_a_folder_without_a_model_is_refused(tmp_path):
    sentence = refusal(hub.kind, str(tmp_path))
    assert f"'{tmp_path}' is not a pipeline, UNet or LoRA: it has no model_index.json" in sentence


# -------------------------------------------------------------------------------------------------
# A model is loaded whole or not at all.

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


def change(folder, part, action):
    """Replace the weights of a part by action(weights)."""
    file = folder / part / FILES[part]
    save_file(action(load_file(file)), file, metadata={"format": "pt"})


def lost(key):
    return lambda weights: {name: w for name, w in weights.items() if name != key}


LOST = {
    "unet": "conv_in.bias",
    "vae": "decoder.conv_out.weight",
    "text_encoder": "encoder.layers.1.mlp.fc1.bias",
    "text_encoder_2": "text_projection.weight",
}


@pytest.mark.parametrize("part", LOST)
def test_a_part_that_lacks_a_weight_is_refused_and_not_completed_at_random(copy, part):
    folder = copy()
    change(folder, part, lost(LOST[part]))
    sentence = refusal(load_pipeline, str(folder))
    assert sentence == (
        f"The {part} of '{folder}', {part}/{FILES[part]}, lacks the weight {LOST[part]}; take a "
        "whole checkpoint."
    )


def test_a_unet_or_vae_alone_that_lacks_a_weight_is_refused(checkpoint, copy):
    folder, whole = copy("sd15"), str(checkpoint("sd15"))
    for part in ("unet", "vae"):
        change(folder, part, lost(LOST[part]))
        for path in (folder, folder / part):
            sentence = refusal(load_pipeline, whole, **{part: str(path)})
            assert f"The {part} of '{path}', " in sentence and LOST[part] in sentence
    sentence = refusal(load_pipeline, whole, unet=f"{whole}/vae")
    assert sentence.startswith(f"The unet of '{whole}/vae', {FILES['vae']}, lacks the weight ")


def test_an_index_that_names_a_weight_which_its_files_lack_is_seen_through(checkpoint, copy):
    folder = copy("sd15")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    (folder / "unet" / FILES["unet"]).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="50KB")
    assert same(model.load_unet(str(folder)).state_dict(), unet.state_dict())
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    file = folder / "unet" / json.loads(index.read_text())["weight_map"]["conv_in.bias"]
    save_file(lost("conv_in.bias")(load_file(file)), file)
    sentence = refusal(model.load_unet, str(folder))
    assert index.name in sentence and "lacks the weight conv_in.bias" in sentence


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_tensor_that_belongs_to_nothing_is_refused(copy, part):
    folder = copy("sd15")
    change(folder, part, lambda weights: weights | {"conv_in.stray": torch.zeros(2)})
    sentence = refusal(load_pipeline, str(folder))
    place = f"The {part} of '{folder}', {part}/{FILES[part]},"
    assert sentence == f"{place} has the tensor conv_in.stray, which its configuration has not."


@both
def test_text_encoders_load_as_the_hub_has_them(checkpoint, copy, kind):
    def as_published(weights):
        names = {name: f"text_model.{name}" for name in weights if name[:5] != "text_"}
        weights = {names.get(name, name): w for name, w in weights.items()}
        return weights | {"text_model.embeddings.position_ids": torch.arange(16)[None]}

    folder = copy(kind)
    for part in ("text_encoder", "text_encoder_2")[: 1 + (kind == "sdxl")]:
        change(folder, part, as_published)
        assert "text_model.embeddings.position_ids" in load_file(folder / part / FILES[part])
    expected = model.identity(load_pipeline(str(checkpoint(kind))))
    assert model.identity(load_pipeline(str(folder))) == expected
    change(folder, "text_encoder", lost("text_model.final_layer_norm.bias"))
    assert "lacks the weight final_layer_norm.bias" in refusal(load_pipeline, str(folder))


def test_a_vae_with_the_names_of_old_releases_loads(checkpoint, copy):
    def aged(weights):
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for name in [name for name in weights if ".attentions." in name]:
            for now, then in old.items():
                if f".{now}." in name:
                    weights[name.replace(f".{now}.", f".{then}.")] = weights.pop(name)
        assert sum(".proj_attn." in name for name in weights) == 4
        return weights

    folder = copy("sd15")
    change(folder, "vae", aged)
    expected = model.identity(load_pipeline(str(checkpoint("sd15"))))
    assert model.identity(load_pipeline(str(folder))) == expected


def halve(folder, parts):
    """Leave of these parts a variant in fp16 alone."""
    for part in parts:
        file = folder / part / FILES[part]
        half = {name: w.half() for name, w in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()


@both
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_an_fp16_variant_is_taken_where_there_is_nothing_else(checkpoint, copy, hub, kind, place):
    folder, parts = copy(kind), [part for part in FILES if (checkpoint(kind) / part).exists()]
    halve(folder, parts)
    name = hub(folder) if place == "hub" else str(folder)
    found, exact = load_pipeline(name), load_pipeline(str(checkpoint(kind)))
    for part in parts:
        rounded = {k: w.half().float() for k, w in getattr(exact, part).state_dict().items()}
        assert same(getattr(found, part).state_dict(), rounded)
    alone = {
        part: hub(folder / part) if place == "hub" else f"{folder}/{part}"
        for part in ("unet", "vae")
    }
    pipeline = load_pipeline(str(checkpoint(kind)), unet=alone["unet"], vae=alone["vae"])
    for part in ("unet", "vae"):
        assert same(getattr(pipeline, part).state_dict(), getattr(found, part).state_dict())


def test_an_fp16_variant_is_left_alone_where_there_is_more_even_if_that_is_damaged(
    checkpoint, copy
):
    folder, whole = copy(), checkpoint()
    halve(folder, FILES)
    for part, name in FILES.items():
        shutil.copy(whole / part / name, folder / part / name)
    expected = model.identity(load_pipeline(str(whole)))
    assert model.identity(load_pipeline(str(folder))) == expected
    for part, name in FILES.items():
        pickled = "pytorch_model.bin" if "text" in part else "diffusion_pytorch_model.bin"
        torch.save(load_file(whole / part / name), folder / part / pickled)
        (folder / part / name).unlink()
    assert model.identity(load_pipeline(str(folder))) == expected  # a pickle is more, too
    for part, name in FILES.items():
        shutil.copy(whole / part / name, folder / part / name)
    for part, name in FILES.items():
        file = folder / part / name
        kept = file.read_bytes()
        file.write_bytes(kept[:-100])
        assert refusal(load_pipeline, str(folder)).startswith(f"Cannot load the {part} of ")
        file.write_bytes(kept)


# -------------------------------------------------------------------------------------------------
# Nothing that a model brings is run.


class Bait:
    """Unpickling it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def bait_unet(folder, trap):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Bait(trap)}, folder / "unet" / "diffusion_pytorch_model.bin")
    return "Unable to load weights from checkpoint file", folder / "unet"


def bait_text_encoder(folder, trap):
    (folder / "text_encoder" / "model.safetensors").unlink()
    torch.save({"x": Bait(trap)}, folder / "text_encoder" / "pytorch_model.bin")
    return "Weights only load failed", folder


def bait_lora(folder, trap):
    shutil.rmtree(folder / "unet")
    (folder / "model_index.json").unlink()
    torch.save({"x": Bait(trap)}, folder / "pytorch_lora_weights.bin")
    return "is not a pipeline, UNet or LoRA", folder


def bait_lora_in_disguise(folder, trap):
    (folder / "lora.safetensors").write_bytes(pickle.dumps(Bait(trap)))
    return "Error while deserializing", folder / "lora.safetensors"


def code_of_a_part(folder, trap):
    edit(folder / "model_index.json", unet=["evil", "Evil"])
    (folder / "unet" / "evil.py").write_text(f"open({str(trap)!r}, 'w')")
    return "evil is not one of the libraries", folder


def code_of_the_scheduler(folder, trap):
    edit(folder / "model_index.json", scheduler=["evil", "Evil"])
    (folder / "scheduler" / "evil.py").write_text(f"open({str(trap)!r}, 'w')")
    return "contains custom code in evil.py", folder


def code_of_the_pipeline(folder, trap):
    edit(folder / "model_index.json", _class_name=["evil", "Evil"])
    (folder / "evil.py").write_text(f"open({str(trap)!r}, 'w')")
    return "is a ['evil', 'Evil']; StableDiffusionXLPipeline and", folder


def code_by_default(folder, trap):
    (folder / "None.py").write_text(f"open({str(trap)!r}, 'w')")
    return "contains custom code in None.py", folder


@pytest.mark.parametrize(
    "make",
    [
        bait_unet,
        bait_text_encoder,
        bait_lora,
        bait_lora_in_disguise,
        code_of_a_part,
        code_of_the_scheduler,
        code_of_the_pipeline,
        code_by_default,
    ],
    ids=lambda make: make.__name__,
)
def test_code_in_a_model_is_refused_and_not_run(checkpoint, copy, tmp_path, make):
    trap = tmp_path / "trap"
    words, path = make(copy(), trap)
    sentence = refusal(model.load_any, str(path), str(checkpoint("sdxl")))
    assert words in sentence and str(path) in sentence
    assert not trap.exists()


def test_the_bait_bites_where_pickles_are_trusted(tmp_path):
    torch.save({"x": Bait(tmp_path / "trap")}, tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "trap").exists()


def test_a_pickle_of_nothing_but_tensors_is_read(checkpoint, copy):
    folder = copy("sd15")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    found = model.load_any(f"{folder}/unet", str(checkpoint("sd15")))
    assert model.identity(found) == model.identity(load_pipeline(str(checkpoint("sd15"))))


# -------------------------------------------------------------------------------------------------
# Identity.


@both
def test_identity_is_16_hex_digits_that_do_not_depend_on_the_place(checkpoint, copy, kind):
    here, there = checkpoint(kind), copy(kind)
    found = model.identity(load_pipeline(str(here)))
    assert len(found) == 16 and int(found, 16) >= 0
    assert found == model.identity(load_pipeline(str(here)))
    assert found == model.identity(load_pipeline(str(there)))
    assert found == model.identity(load_pipeline(str(here), unet=f"{there}/unet"))


@both
def test_identity_survives_saving(checkpoint, tmp_path, kind):
    pipeline = load_pipeline(str(checkpoint(kind)))
    model.save_pipeline(pipeline, pipeline.unet.state_dict(), tmp_path / "again")
    assert model.identity(load_pipeline(str(tmp_path / "again"))) == model.identity(pipeline)


@both
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_identity_changes_with_the_last_bit_of_any_weight(checkpoint, kind, part):
    pipeline = load_pipeline(str(checkpoint(kind)))
    module = getattr(pipeline, part, None)
    seen = {model.identity(pipeline)}
    weights = list(module.parameters()) if module is not None else []
    for weight in weights[:: max(len(weights) // 5, 1)]:
        weight.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
        identity = model.identity(pipeline)
        assert identity not in seen
        seen.add(identity)


def test_identity_changes_with_precision_and_with_a_lora(checkpoint, tmp_path):
    base = str(checkpoint("sdxl"))
    write_lora(base, tmp_path / "a")
    write_lora(base, tmp_path / "b", alpha=9.0)  # the same tensors, another scale
    paths = [base, str(tmp_path / "a"), str(tmp_path / "b")]
    found = [model.identity(model.load_any(path, base)) for path in paths]
    for dtype in (torch.float16, torch.bfloat16):
        found.append(model.identity(load_pipeline(base, dtype=dtype)))
    assert len(set(found)) == 5


SETTINGS = {
    "scheduler/scheduler_config.json": {"beta_end": 0.013},
    "unet/config.json": {"norm_eps": 1e-4},
    "vae/config.json": {"scaling_factor": 0.2},
    "text_encoder/config.json": {"hidden_act": "gelu"},
    "model_index.json": {"force_zeros_for_empty_prompt": False},
}


@pytest.mark.parametrize("file", SETTINGS)
def test_identity_changes_with_a_setting_that_no_weight_shows(checkpoint, copy, file):
    folder = copy()
    edit(folder / file, **SETTINGS[file])
    base = load_pipeline(str(checkpoint("sdxl")))
    assert model.identity(load_pipeline(str(folder))) != model.identity(base)


def test_identity_changes_with_the_class_of_the_scheduler(checkpoint):
    pipeline = load_pipeline(str(checkpoint("sdxl")))
    before = model.identity(pipeline)
    cls = diffusers.EulerAncestralDiscreteScheduler
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
    assert model.identity(pipeline) != before


def test_identity_does_not_depend_on_paths_and_versions_that_are_written_down(
    checkpoint, copy, monkeypatch
):
    expected, folder = model.identity(load_pipeline(str(checkpoint("sdxl")))), copy()
    for file in (*SETTINGS, "text_encoder_2/config.json"):
        edit(folder / file, _diffusers_version="0.1", _name_or_path="/home/me", _note="mine")
    edit(folder / "text_encoder/config.json", architectures=["CLIPModel"])
    monkeypatch.setattr(transformers.configuration_utils, "__version__", "9.9")
    assert model.identity(load_pipeline(str(folder))) == expected


def test_identity_does_not_depend_on_how_weights_came_to_their_precision(checkpoint):
    loaded = load_pipeline(str(checkpoint("sdxl")), dtype=torch.bfloat16)
    cast = load_pipeline(str(checkpoint("sdxl")))
    for part in (cast.unet, cast.text_encoder, cast.text_encoder_2):
        part.to(torch.bfloat16)  # not the VAE, which stays in fp32
    assert model.identity(loaded) == model.identity(cast)


def test_identity_knows_names_shapes_and_dtypes_as_well_as_bytes(checkpoint):
    pipeline = load_pipeline(str(checkpoint("sd15")))
    layer, found = pipeline.unet.conv_out, [model.identity(pipeline)]
    bias = layer.bias
    for other in (bias.view(2, 2), bias.view(torch.int32)):
        layer.bias = torch.nn.Parameter(other, requires_grad=False)
        found.append(model.identity(pipeline))
    del layer.bias
    layer.register_buffer("shift", bias)  # the last tensor of its module, as the bias was
    found.append(model.identity(pipeline))
    assert len(set(found)) == 4


def test_identity_knows_which_tensor_holds_the_bytes(checkpoint):
    pipeline = load_pipeline(str(checkpoint("sdxl")))
    before = model.identity(pipeline)
    attention = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q, attention.to_k = attention.to_k, attention.to_q
    assert model.identity(pipeline) != before  # else swapped queries and keys would be one model
    attention.to_q, attention.to_k = attention.to_k, attention.to_q
    assert model.identity(pipeline) == before
    pipeline.unet.to(memory_format=torch.channels_last)
    assert model.identity(pipeline) == before


# -------------------------------------------------------------------------------------------------
# Encode.


def conditioning_of(pipeline, prompts):
    """(unconditional, conditional) as the pipeline's own __call__ hands them to its UNet."""
    seen = []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    pipeline(prompts, guidance_scale=5, num_inference_steps=1, output_type="latent")
    hook.remove()
    keys = ("encoder_hidden_states", "added_cond_kwargs")
    halves = {key: seen[0][key] for key in keys if seen[0].get(key) is not None}
    take = lambda cond, i: {  # noqa: E731
        key: take(x, i) if isinstance(x, dict) else x.chunk(2)[i] for key, x in cond.items()
    }
    return take(halves, 0), take(halves, 1)


@pytest.mark.parametrize("kind, zeros", [("sdxl", True), ("sdxl", False), ("sd15", None)])
def test_conditioning_is_what_the_pipeline_feeds_its_unet(checkpoint, kind, zeros):
    pipeline = load_pipeline(str(checkpoint(kind)))
    if zeros is not None:
        pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    without, with_text = conditioning_of(pipeline, CAPTIONS)
    empty = model.encode_prompts(pipeline, [""] * len(CAPTIONS), SIZE)
    assert same(model.encode_prompts(pipeline, CAPTIONS, SIZE), with_text)
    assert same(empty, without)
    assert (empty["encoder_hidden_states"] == 0).all() == (zeros is True)
    if kind == "sdxl":
        assert (empty["added_cond_kwargs"]["text_embeds"] == 0).all() == zeros
        assert empty["added_cond_kwargs"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 3


@both
def test_a_dropped_caption_among_others_is_encoded_as_if_alone(checkpoint, kind):
    pipeline = load_pipeline(str(checkpoint(kind)))
    captions = [CAPTIONS[0], "", CAPTIONS[1]]
    together = model.encode_prompts(pipeline, captions, SIZE)
    for i, caption in enumerate(captions):
        alone = model.encode_prompts(pipeline, [caption], SIZE)
        torch.testing.assert_close(
            together["encoder_hidden_states"][i : i + 1], alone["encoder_hidden_states"]
        )
        if kind == "sdxl":
            for key, value in alone["added_cond_kwargs"].items():
                torch.testing.assert_close(together["added_cond_kwargs"][key][i : i + 1], value)


@both
def test_conditioning_has_the_precision_of_the_text_encoders(checkpoint, kind):
    pipeline = load_pipeline(str(checkpoint(kind)), dtype=torch.bfloat16)
    cond = model.encode_prompts(pipeline, CAPTIONS, 1024)
    tensors = [cond["encoder_hidden_states"], *cond.get("added_cond_kwargs", {}).values()]
    assert {x.dtype for x in tensors} == {torch.bfloat16}
    if kind == "sdxl":
        assert cond["added_cond_kwargs"]["time_ids"][0].tolist() == [1024, 1024, 0, 0, 1024, 1024]


def test_repeating_gives_all_winners_and_then_all_losers():
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    cond = model.repeat({"text": a, "added": {"pooled": b}})
    assert cond["text"].tolist() == [[1], [2], [1], [2]]
    assert cond["added"]["pooled"].tolist() == [[3], [4], [3], [4]]
    assert model.repeat({"text": a}, 3)["text"].tolist() == [[1], [2], [1], [2], [1], [2]]


IMAGE_TO_IMAGE = {
    "sdxl": diffusers.StableDiffusionXLImg2ImgPipeline,
    "sd15": diffusers.StableDiffusionImg2ImgPipeline,
}


def random_pixels(n):
    return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7)) * 2 - 1


def test_images_become_the_latents_that_image_to_image_starts_from(checkpoint):
    pipeline, pixels = load_pipeline(str(checkpoint("sdxl"))), random_pixels(3)
    theirs = diffusers.StableDiffusionXLImg2ImgPipeline(**pipeline.components).prepare_latents(
        pixels, None, 3, 1, torch.float32, "cpu", generators(1, 2, 3), add_noise=False
    )
    ours = model.encode_images(pipeline, pixels, generators(1, 2, 3))
    assert ours.shape == (3, 4, SIZE // 2, SIZE // 2) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


@both
def test_latents_are_scaled_draws_from_the_posterior(checkpoint, kind):
    pipeline, pixels = load_pipeline(str(checkpoint(kind))), random_pixels(2)
    latents = model.encode_images(pipeline, pixels, generators(4, 5))
    posterior = pipeline.vae.encode(pixels).latent_dist
    noise = [torch.randn(1, *latents.shape[1:], generator=g) for g in generators(4, 5)]
    expected = (posterior.mean + posterior.std * torch.cat(noise)) * 0.18215
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(latents, model.encode_images(pipeline, pixels, generators(6, 7)))
    model.encode_images(pipeline, pixels)  # generators are optional


MOMENTS = {"latents_mean": [0.5, -1.0, 2.0, 0.0], "latents_std": [2.0, 0.5, 3.0, 1.0]}


def test_mean_and_std_of_the_latents_are_applied_as_by_diffusers(checkpoint, copy):
    folder = copy("sdxl")
    edit(folder / "vae" / "config.json", **MOMENTS)
    pipeline, pixels = load_pipeline(str(folder)), random_pixels(3)
    theirs = diffusers.StableDiffusionXLImg2ImgPipeline(**pipeline.components).prepare_latents(
        pixels, None, 3, 1, torch.float32, "cpu", generators(1, 2, 3), add_noise=False
    )
    ours = model.encode_images(pipeline, pixels, generators(1, 2, 3))
    torch.testing.assert_close(ours, theirs)
    plain = load_pipeline(str(checkpoint("sdxl")))
    assert not torch.allclose(ours, model.encode_images(plain, pixels, generators(1, 2, 3)))

    options = dict(num_inference_steps=2, guidance_scale=4.0, generator=generators(5, 6, 7))
    assert levels(draw(pipeline), pipeline(CAPTIONS, **options).images) <= 1
    assert levels(draw(pipeline), draw(plain)) > 5
    edit(folder / "vae" / "config.json", latents_std=None)  # one alone diffusers ignores
    assert levels(draw(load_pipeline(str(folder))), draw(plain)) == 0


def test_a_mean_of_the_latents_that_sd15_would_ignore_is_refused(checkpoint, copy):
    folder = copy("sd15")
    edit(folder / "vae" / "config.json", **MOMENTS)
    for name, vae in ((folder, None), (checkpoint("sd15"), folder / "vae")):
        sentence = refusal(load_pipeline, str(name), vae=vae and str(vae))
        assert f"'{vae or folder}' has latents_mean" in sentence and "--vae" in sentence


def test_the_latent_of_an_image_does_not_depend_on_its_batch(checkpoint):
    pipeline, pixels = load_pipeline(str(checkpoint("sdxl"))), random_pixels(3)
    together = model.encode_images(pipeline, pixels, generators(1, 2, 3))
    for i in range(3):
        alone = model.encode_images(pipeline, pixels[i : i + 1], generators(i + 1))
        assert torch.equal(together[i : i + 1], alone)


def test_latents_of_an_fp16_vae_are_fp32(checkpoint):
    pipeline = load_pipeline(str(checkpoint("sd15")), dtype=torch.float16)
    exact = load_pipeline(str(checkpoint("sd15")))
    latents = model.encode_images(pipeline, random_pixels(1), generators(1))
    assert latents.dtype == torch.float32
    mean = exact.vae.encode(random_pixels(1)).latent_dist.mean * 0.18215
    spread = exact.vae.encode(random_pixels(1)).latent_dist.std.max() * 0.18215
    assert (latents - mean).abs().max() < 5 * spread


# -------------------------------------------------------------------------------------------------
# Predict.


class Recorder:
    """A unet that returns a given output and records how it was called."""

    def __init__(self, output):
        self.output = output

    def __call__(self, x, t, **options):
        self.x, self.t, self.options = x, t, options
        return (self.output,)


@both
def test_an_epsilon_model_predicts_its_raw_output(checkpoint, kind):
    pipeline = load_pipeline(str(checkpoint(kind)))
    cond = model.encode_prompts(pipeline, CAPTIONS, SIZE)
    x, t = torch.randn(3, 4, 8, 8, generator=generators(0)[0]), torch.tensor([0, 500, 999])
    abar = model.alphas_cumprod(pipeline)
    with torch.no_grad():
        eps = model.predict_noise(pipeline.unet, x, t, cond, abar)
        assert torch.equal(eps, pipeline.unet(x, t, **cond).sample)


def test_a_v_model_that_is_right_predicts_the_true_noise():
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    x0, eps = torch.randn(2, 4, 4, 8, 8, generator=generators(0)[0])
    t = torch.tensor([0, 300, 700, 999])
    xt, v = scheduler.add_noise(x0, eps, t), scheduler.get_velocity(x0, eps, t)
    cond = {"encoder_hidden_states": torch.zeros(4, 2, 3, dtype=torch.bfloat16)}
    found = model.predict_noise(Recorder(v), xt, t, cond, scheduler.alphas_cumprod, "v_prediction")
    torch.testing.assert_close(found, eps, rtol=0, atol=1e-5)
    raw = model.predict_noise(Recorder(v), xt, t, cond, scheduler.alphas_cumprod)
    assert torch.equal(raw, v)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_half_precision_unet_gets_its_own_precision_and_gives_fp32(prediction):
    unet = Recorder(torch.ones(2, 4, 8, 8, dtype=torch.bfloat16))
    text = torch.zeros(2, 2, 3, dtype=torch.bfloat16)
    cond = {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": text}}
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 4])
    out = model.predict_noise(unet, x, t, cond, torch.linspace(1, 0.1, 10), prediction)
    assert out.dtype == torch.float32
    assert torch.equal(unet.x, x.bfloat16())
    assert unet.t is t  # a (B,) tensor: a number would be a graph of its own
    assert unet.options == cond | {"return_dict": False}


# -------------------------------------------------------------------------------------------------
# Schedule.


@both
def test_the_schedule_is_the_one_of_the_checkpoint(checkpoint, kind):
    abar = model.alphas_cumprod(load_pipeline(str(checkpoint(kind))))
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert abar.shape == (1000,) and abar.dtype == torch.float32
    torch.testing.assert_close(abar.double(), (1 - beta).cumprod(0), rtol=1e-4, atol=0)


@both
def test_a_schedule_of_zero_terminal_snr_keeps_sigma_finite(checkpoint, kind):
    pipeline = load_pipeline(str(checkpoint(kind)))
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, rescale_betas_zero_snr=True
    )
    theirs, abar = pipeline.scheduler.alphas_cumprod, model.alphas_cumprod(pipeline)
    assert theirs[-1] == 0 and abar[-1] == 2**-24
    assert torch.equal(abar[:-1], theirs[:-1])


# -------------------------------------------------------------------------------------------------
# Sample and save.


@both
def test_samples_are_those_of_the_pipeline_itself(checkpoint, kind):
    pipeline = load_pipeline(str(checkpoint(kind)))
    theirs = pipeline(
        CAPTIONS,
        generator=generators(5, 6, 7),
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="pil",
    ).images
    ours = model.sample(pipeline, CAPTIONS, [5, 6, 7], 3, 4.0)
    assert [image.size for image in ours] == [(SIZE, SIZE)] * 3
    assert levels(ours, theirs) == 0


@both
def test_a_sample_depends_on_its_seed_but_not_on_the_batch(checkpoint, kind):
    pipeline = load_pipeline(str(checkpoint(kind)))
    prompts, seeds = CAPTIONS + CAPTIONS[:1], [5, 6, 7, 8]
    together = model.sample(pipeline, prompts, seeds, 2, 4.0, batch=16)
    for batch in (1, 3):
        assert levels(together, model.sample(pipeline, prompts, seeds, 2, 4.0, batch)) <= 1
    assert levels(together[:1], together[3:]) > 10  # same prompt, another seed
    assert levels(together[:1], model.sample(pipeline, prompts[1:2], [5], 2, 4.0)) > 0


@pytest.mark.parametrize("limit, expected", [(10**6, [3]), (2 * SIZE**2, [2, 1]), (1, [1, 1, 1])])
def test_the_vae_decodes_as_many_images_at_once_as_the_limit_allows(
    checkpoint, monkeypatch, limit, expected
):
    pipeline = load_pipeline(str(checkpoint()))
    whole, decode, sizes = draw(pipeline), pipeline.vae.decode, []

    def counted(latents):
        sizes.append(len(latents))
        return decode(latents)

    monkeypatch.setattr(pipeline.vae, "decode", counted)
    monkeypatch.setattr(model, "DECODED", limit)
    assert levels(draw(pipeline), whole) <= (0 if expected == [3] else 1)
    assert sizes == expected


def test_a_megapixel_is_decoded_at_once():
    assert model.DECODED // 1024**2 == 1 and model.DECODED // 64**2 >= 16


@both
@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error_and_no_black_picture(checkpoint, kind, part, value):
    pipeline = load_pipeline(str(checkpoint(kind)), dtype=torch.bfloat16)
    layer = pipeline.unet.conv_out if part == "unet" else pipeline.vae.decoder.conv_out
    layer.bias[0] = value
    dtype = "bfloat16" if part == "unet" else ("float32" if kind == "sdxl" else "float16")
    sentence = refusal(draw, pipeline)
    assert f"The {part.replace('unet', 'UNet').replace('vae', 'VAE')} draws" in sentence
    assert f"not finite in {dtype};" in sentence


@both
def test_samples_in_half_precision_are_near_those_in_fp32(checkpoint, kind):
    exact = load_pipeline(str(checkpoint(kind)))
    rounded = load_pipeline(str(checkpoint(kind)), dtype=torch.bfloat16)
    images = [model.sample(pipeline, CAPTIONS, [5, 6, 7], 2, 1.0) for pipeline in (exact, rounded)]
    assert levels(*images) < 25


@both
def test_a_saved_pipeline_loads_without_arguments_and_samples_the_same(checkpoint, tmp_path, kind):
    pipeline = load_pipeline(str(checkpoint(kind)))
    unet, before = pipeline.unet, model.sample(pipeline, CAPTIONS, [5, 6, 7], 2, 4.0)
    weights = other_unet(checkpoint(kind))
    model.save_pipeline(pipeline, weights, tmp_path / "policy")
    assert pipeline.unet is unet
    assert levels(before, model.sample(pipeline, CAPTIONS, [5, 6, 7], 2, 4.0)) == 0

    saved = KINDS[kind].from_pretrained(tmp_path / "policy")
    saved.set_progress_bar_config(disable=True)
    assert same(saved.unet.state_dict(), weights)
    unet.load_state_dict(weights)
    expected = model.sample(pipeline, CAPTIONS, [5, 6, 7], 2, 4.0)
    assert levels(before, expected) > 0
    assert levels(expected, model.sample(saved, CAPTIONS, [5, 6, 7], 2, 4.0)) == 0
    assert hub.architecture(str(tmp_path / "policy")) == kind  # and trains on from there
    assert same(load_pipeline(str(tmp_path / "policy")).unet.state_dict(), weights)


def assert_readable_by_older_releases(folder, tokenizer):
    """Older releases read vocab.json and merges.txt, and know text encoders by text_model."""
    for path in folder.glob("tokenizer*"):
        assert json.loads((path / "vocab.json").read_text()) == tokenizer.get_vocab()
        alone = path / "alone"
        alone.mkdir()
        for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            shutil.copy(path / file, alone)
        texts = dict(text=[*CAPTIONS, "A RED circle!", ""], padding="max_length")
        read = transformers.CLIPTokenizer.from_pretrained(alone)
        assert read(**texts).input_ids == tokenizer(**texts).input_ids
    for path in folder.glob("text_encoder*"):
        names = set(load_file(path / "model.safetensors")) - {"text_projection.weight"}
        assert names and all(name.split(".")[0] == "text_model" for name in names)
        assert all(name.split(".")[1] != "text_model" for name in names)


@both
@pytest.mark.parametrize("published", [False, True])
def test_a_saved_pipeline_has_what_older_releases_read(copy, tmp_path, kind, published):
    folder = copy(kind)
    if published:
        prefix = "text_model."
        add = lambda weights: {f"{prefix}{name}": w for name, w in weights.items()}  # noqa: E731
        change(folder, "text_encoder", add)
    if kind == "sd15":  # transformers 5 would load it as a class of its own
        (folder / "feature_extractor").mkdir()
        settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}}
        file = folder / "feature_extractor" / "preprocessor_config.json"
        file.write_text(json.dumps(settings))
        edit(folder / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    pipeline = load_pipeline(str(folder))
    model.save_pipeline(pipeline, pipeline.unet.state_dict(), tmp_path / "out")
    assert_readable_by_older_releases(tmp_path / "out", pipeline.tokenizer)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["feature_extractor"] == [None, None]
    assert model.identity(load_pipeline(str(tmp_path / "out"))) == model.identity(pipeline)


def test_the_embedded_model_and_one_pretrained_anew_have_what_older_releases_read(tmp_path):
    tiny = load_pipeline("tiny").tokenizer
    shutil.copytree(hub.PRESETS["tiny"], tmp_path / "tiny")
    pretrain.pretrain(tmp_path / "anew", n=64, vae_steps=1, unet_steps=1)
    for name in ("tiny", "anew"):
        assert_readable_by_older_releases(tmp_path / name, tiny)


def test_a_disk_that_is_full_for_the_tokenizer_is_an_os_error(checkpoint, tmp_path, monkeypatch):
    pipeline = load_pipeline(str(checkpoint()))
    monkeypatch.setattr(pipeline, "save_pretrained", pipeline.tokenizer.save_pretrained)
    with small_disk(500), pytest.raises(OSError, match="File too large"):
        model.write_pipeline(pipeline, tmp_path)


def test_weights_are_saved_in_the_precision_they_have(checkpoint, tmp_path):
    weights = {k: w.bfloat16() for k, w in other_unet(checkpoint("sdxl")).items()}
    model.save_pipeline(load_pipeline(str(checkpoint("sdxl"))), weights, tmp_path)
    assert same(load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors"), weights)


def test_weights_of_another_unet_are_refused(checkpoint, tmp_path):
    pipeline, weights = load_pipeline(str(checkpoint("sdxl"))), other_unet(checkpoint("sdxl"))
    unet = pipeline.unet
    weights.pop("conv_in.weight")
    with pytest.raises(RuntimeError, match="conv_in.weight"):
        model.save_pipeline(pipeline, weights, tmp_path)
    assert pipeline.unet is unet and not list(tmp_path.iterdir())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unet_saved_alone_loads_alone_with_its_weights_and_settings(
    checkpoint, tmp_path, kind, dtype
):
    weights = {k: w.to(dtype) for k, w in other_unet(checkpoint(kind)).items()}
    config = load_pipeline(str(checkpoint(kind))).unet.config
    model.save_unet(config, weights, tmp_path / "unet alone")
    files = {path.name for path in (tmp_path / "unet alone").iterdir()}
    assert files == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert same(load_file(tmp_path / "unet alone" / "diffusion_pytorch_model.safetensors"), weights)
    loaded = model.load_unet(str(tmp_path / "unet alone"), dtype)
    assert same(loaded.state_dict(), weights)
    visible = lambda c: {k: v for k, v in c.items() if k[0] != "_"}  # noqa: E731
    assert visible(loaded.config) == visible(config)
    assert hub.kind(str(tmp_path / "unet alone")) == "unet"


def test_a_unet_alone_of_other_weights_is_refused(checkpoint, tmp_path):
    weights = other_unet(checkpoint("sdxl"))
    weights.pop("conv_in.weight")
    with pytest.raises(RuntimeError, match="conv_in.weight"):
        model.save_unet(hub.read_config(str(checkpoint("sdxl")), "unet"), weights, tmp_path)
    assert not list(tmp_path.iterdir())
