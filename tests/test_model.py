"""Laws of model.py, on small random checkpoints of both architectures.

The references are diffusers' own: its pipelines' __call__, schedulers and loaders."""

import functools
import json
import pickle
import shutil
from pathlib import Path

import diffusers
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import refusal, small_disk
from safetensors.torch import load_file, save_file

import model
from lab import pretrain
from system import hub
from weights import loading, saving
from weights.loading import load_pipeline

SIZE, CAPTIONS = 16, ["a red circle on a white background", "zebra", "a blue cross"]
KINDS = {
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd15": diffusers.StableDiffusionPipeline,
}
TEXT = ("text_encoder", "text_encoder_2")
DIFFUSION, TRANSFORMER = "diffusion_pytorch_model.safetensors", "model.safetensors"
FILES = {"unet": DIFFUSION, "vae": DIFFUSION} | dict.fromkeys(TEXT, TRANSFORMER)
both = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    """loaded(kind) -> a pipeline that tests share; they must not change it."""
    return functools.cache(lambda kind="sdxl": load_pipeline(str(checkpoint(kind))))


@pytest.fixture
def copy(checkpoint, tmp_path):
    """copy(kind) -> a folder of its own that a test may spoil."""
    return lambda kind="sdxl": shutil.copytree(checkpoint(kind), tmp_path / kind)


def edit(file, **entries):
    """Change entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def change(folder, part, action):
    """Replace the weights of a part by action(weights)."""
    file = folder / part / FILES[part]
    save_file(action(load_file(file)), file, metadata={"format": "pt"})


def other_unet(folder):
    """The weights of a pipeline's UNet, every one of them changed."""
    weights = load_file(folder / "unet" / DIFFUSION)
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


def parts_of(pipeline):
    """{name: module} of UNet, VAE and text encoders."""
    parts = {name: getattr(pipeline, name, None) for name in FILES}
    return {name: module for name, module in parts.items() if module is not None}


def levels(left, right):
    """Largest difference of two lists of pictures, in levels of 0..255."""
    to_numpy = diffusers.image_processor.VaeImageProcessor.pil_to_numpy
    return abs(to_numpy(left) - to_numpy(right)).max() * 255


def draw(pipeline):
    return model.sample(pipeline, CAPTIONS, [5, 6, 7], 2, 4.0)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# -------------------------------------------------------------------------------------------------
# Load.


@both
def test_parameters_are_counted_without_weights(checkpoint, kind):
    config = hub.read_config(str(checkpoint(kind)), "unet")
    weights = load_file(checkpoint(kind) / "unet" / DIFFUSION)
    assert loading.count_parameters(config) == sum(w.numel() for w in weights.values())


def test_the_published_sd15_unet_has_860_million_parameters():
    config = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
    assert loading.count_parameters(config) == 859_520_964


@both
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_loaded_pipeline_is_the_stored_one_ready_for_inference(checkpoint, kind, prediction):
    pipeline = load_pipeline(str(checkpoint(kind, prediction)))
    reference = KINDS[kind].from_pretrained(checkpoint(kind, prediction))
    assert type(pipeline) is KINDS[kind]
    assert pipeline.scheduler.config.prediction_type == prediction
    for name, part in parts_of(pipeline).items():
        assert same(part.state_dict(), getattr(reference, name).state_dict())
        assert {weight.dtype for weight in part.parameters()} == {torch.float32}
        assert not part.training and not any(p.requires_grad for p in part.parameters())


def without(path):
    return lambda folder: (folder / path).unlink()


def truncated(folder):
    file = folder / "text_encoder" / TRANSFORMER
    file.write_bytes(file.read_bytes()[:-100])


def flow_matching(folder):
    name = "FlowMatchEulerDiscreteScheduler"
    edit(folder / "model_index.json", scheduler=["diffusers", name])
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))


def sample_prediction(folder):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")


def noiseless(folder):
    edit(folder / "scheduler" / "scheduler_config.json", beta_start=0.0)


def index(text):
    return lambda folder: (folder / "model_index.json").write_text(text)


FLUX, NO_CLASS = index('{"_class_name": "FluxPipeline"}'), index("{}")
MISTAKES = {  # what is done to the folder (None: the key is the name), and words of the sentence
    "sdxxl": (None, "Unknown diffusers pipeline 'sdxxl': there is no folder of that name here"),
    "owner/absent-model": (None, "the hub cannot be reached; check the network, or name a local"),
    "no folder": (shutil.rmtree, "Unknown diffusers pipeline"),
    "no pipeline": (without("model_index.json"), "it has no model_index.json"),
    "another class": (FLUX, "is a FluxPipeline; StableDiffusionXLPipeline and StableDiffusionPipe"),
    "no class": (NO_CLASS, "is a pipeline without a class; StableDiffusionXLPipeline"),
    "broken index": (index("{"), "model_index.json cannot be read (Expecting "),
    "index that is a list": (index("[]"), "model_index.json cannot be read (it holds no JSON obj"),
    "no weights": (without(f"unet/{DIFFUSION}"), f"it has no unet/{DIFFUSION} or "),
    "no VAE": (lambda folder: shutil.rmtree(folder / "vae"), "it has no vae/config.json"),
    "no text weights": (
        without(f"text_encoder/{TRANSFORMER}"),
        "it has no text_encoder/model.safetensors or text_encoder/pytorch_model.bin",
    ),
    "truncated": (truncated, "Cannot load the text_encoder"),
    "flow matching": (flow_matching, "a FlowMatchEulerDiscreteScheduler, which has no alphas_cum"),
    "no noise at t = 0": (noiseless, "abar of a schedule lies in [0, 1); got 0.0"),
    "predicts x0": (sample_prediction, "predicts 'sample'; epsilon and v_prediction can be train"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_model_is_one_sentence_that_names_it(copy, mistake):
    (spoil, words), name = MISTAKES[mistake], mistake
    if spoil:
        name = str(copy())
        spoil(Path(name))
    sentence = refusal(load_pipeline, name)
    assert name in sentence and words in sentence


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_mistake_in_a_replaced_part_is_one_sentence_that_names_it(checkpoint, copy, part):
    empty = copy("sd15")
    shutil.rmtree(empty / part)
    for name, words in {
        "nothing": f"Unknown {part} checkpoint or pipeline",
        str(empty): f"it has no {part}/config.json",
        "owner/absent-model": f"Cannot load the {part}",
    }.items():
        sentence = refusal(load_pipeline, str(checkpoint()), **{part: name})
        assert f"'{name}'" in sentence and words in sentence


def test_a_unet_that_reads_other_text_is_refused(checkpoint, tmp_path):
    sdxl, sd15 = checkpoint("sdxl"), checkpoint("sd15")
    config = diffusers.UNet2DConditionModel.load_config(sdxl, subfolder="unet")
    unpooled = diffusers.UNet2DConditionModel.from_config(config, addition_embed_type=None)
    unpooled.save_pretrained(tmp_path)  # of the right width
    for folder, unet in [(sdxl, sd15), (sd15, sdxl), (sdxl, tmp_path)]:
        sentence = refusal(load_pipeline, str(folder), unet=str(unet))
        assert sentence == f"The UNet of '{unet}' does not read the text of '{folder}'."


@both
@pytest.mark.parametrize("layout", ["pipeline", "unet subfolder", "unet root"])
def test_a_unet_is_taken_from_any_layout(checkpoint, copy, loaded, tmp_path, kind, layout):
    folder, weights = checkpoint(kind), other_unet(checkpoint(kind))
    source = copy(kind) if layout == "pipeline" else tmp_path / "policy"
    write_unet(folder, weights, source if layout == "unet root" else source / "unet")
    pipeline = load_pipeline(str(folder), unet=str(source))
    assert same(pipeline.unet.state_dict(), weights)
    assert same(loading.load_unet(str(source)).state_dict(), weights)
    assert not same(loaded(kind).unet.state_dict(), weights)


def test_a_vae_is_taken_from_another_checkpoint_with_its_precision(checkpoint, copy):
    fixed = copy("sd15")
    edit(fixed / "vae" / "config.json", force_upcast=False, scaling_factor=0.5)
    for source in (fixed, fixed / "vae"):  # a pipeline, and a VAE alone
        pipeline = load_pipeline(str(checkpoint()), vae=str(source), dtype=torch.bfloat16)
        assert pipeline.vae.config.scaling_factor == 0.5
        exact = load_pipeline(str(fixed)).vae
        assert same(pipeline.vae.state_dict(), exact.to(torch.float16).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("overflows", [True, False])
@both
def test_in_half_precision_the_vae_takes_fp16_unless_it_overflows(
    copy, loaded, dtype, kind, overflows
):
    folder = copy(kind)
    edit(folder / "vae" / "config.json", force_upcast=overflows)
    pipeline = load_pipeline(str(folder), dtype=dtype)
    expected = torch.float32 if overflows and kind == "sdxl" else torch.float16
    exact = {name: w.to(expected) for name, w in loaded(kind).vae.state_dict().items()}
    assert same(pipeline.vae.state_dict(), exact)  # rounded once at most
    others = {part.dtype for name, part in parts_of(pipeline).items() if name != "vae"}
    assert others == {dtype}


# -------------------------------------------------------------------------------------------------
# Anything that NAME=PATH of an evaluation points at.


def write_lora(folder, into, alpha=8.0, metadata=True, kohya=False, text=True):
    """(file, weights) of a random LoRA of rank 4 for a pipeline, by peft and diffusers."""
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
    if kohya:
        weights = as_kohya(weights, alpha)
        save_file(weights, file)
    return file, weights


@pytest.fixture(scope="module")
def lora(checkpoint, tmp_path_factory):
    """lora(kind) -> (file, weights) of a LoRA for that architecture; tests share the file."""
    place = tmp_path_factory.mktemp
    return functools.cache(lambda kind="sdxl": write_lora(checkpoint(kind), place("lora")))


def as_kohya(weights, alpha=8.0):
    """The keys of another trainer, which keeps alpha in the file."""
    renamed = {}
    for key, weight in weights.items():
        place, end = key.split(".lora_")
        place = "lora_" + place.replace(".", "_").replace("text_encoder", "te")
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
    for name, part in parts_of(left).items():
        ours, theirs = part.state_dict(), getattr(right, name).state_dict()
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], **tolerance)


@both
def test_a_unet_alone_draws_what_the_pipeline_with_it_draws(
    checkpoint, copy, loaded, tmp_path, on_hub, kind
):
    whole, root, within = copy(kind), tmp_path / "root", tmp_path / "within"
    write_unet(whole, other_unet(whole), whole / "unet")
    for place in (root, within / "unet"):
        shutil.copytree(whole / "unet", place)
    expected = loading.load_any(str(whole))
    for path in (str(root), str(within), on_hub(root), on_hub(within)):
        found = loading.load_any(path, str(checkpoint(kind)))
        assert model.identity(found) == model.identity(expected)
    assert levels(draw(found), draw(expected)) == 0
    assert levels(draw(found), draw(loaded(kind))) > 0


def test_what_is_loaded_has_the_precision_asked_for_and_is_ready_for_inference(checkpoint, lora):
    base = str(checkpoint())
    reference = load_pipeline(base, dtype=torch.bfloat16)
    for path in (base, f"{base}/unet", str(lora()[0])):
        pipeline = loading.load_any(path, base, torch.bfloat16)
        for name, part in parts_of(pipeline).items():
            theirs = getattr(reference, name)
            assert part.dtype == theirs.dtype and not part.training
            assert not any(p.requires_grad for p in part.parameters())
            assert part.state_dict().keys() == theirs.state_dict().keys()


def test_the_pipeline_around_a_path_is_itself_or_the_base(checkpoint, lora):
    whole, (file, _) = str(checkpoint("sd15")), lora("sd15")
    assert loading.pipeline_of(whole, None) == loading.pipeline_of(whole, "other") == whole
    for alone in (f"{whole}/unet", str(file), str(file.parent)):
        assert loading.pipeline_of(alone, "other") == "other"
        for action in (loading.pipeline_of, loading.load_any):
            sentence = refusal(action, alone, None)
            assert f"'{alone}'" in sentence and "name one with --base" in sentence


@both
@pytest.mark.parametrize("written", ["with alpha", "without alpha", "by another trainer"])
def test_a_lora_is_alpha_over_r_times_b_a_added_to_the_weights(
    checkpoint, loaded, tmp_path, kind, written
):
    base, kohya = checkpoint(kind), written == "by another trainer"
    options = dict(metadata=written == "with alpha", text=not kohya)
    file, weights = write_lora(base, tmp_path, **options)
    if kohya:
        save_file(as_kohya(weights), file)
    found = loading.load_any(str(file), str(base))
    expected = hand_made(base, weights, 1.0 if written == "without alpha" else 8.0 / 4)
    assert_same_weights(found, expected, rtol=1e-5, atol=1e-6)
    assert not same(found.unet.state_dict(), loaded(kind).unet.state_dict())


@both
def test_a_lora_draws_what_it_draws_as_an_adapter_of_diffusers(checkpoint, kind, lora, on_hub):
    base, folder = str(checkpoint(kind)), lora(kind)[0].parent
    theirs = load_pipeline(base)
    theirs.load_lora_weights(folder, weight_name=hub.LORA)
    ours = [loading.load_any(path, base) for path in (str(folder), on_hub(folder))]
    assert levels(draw(ours[0]), draw(theirs)) <= 1
    assert model.identity(ours[0]) == model.identity(ours[1])


def test_a_lora_of_scale_0_changes_nothing(checkpoint, loaded, tmp_path):
    write_lora(checkpoint(), tmp_path, alpha=0.0)
    found = loading.load_any(str(tmp_path), str(checkpoint()))
    assert model.identity(found) == model.identity(loaded())


def test_a_lora_in_half_precision_is_near_that_in_fp32(checkpoint, lora):
    (file, weights), base = lora("sd15"), str(checkpoint("sd15"))
    found = loading.load_any(str(file), base, torch.float16).to(torch.float32)
    assert_same_weights(found, hand_made(base, weights, 2.0), rtol=2e-3, atol=2e-3)


def stray(place, width):
    """Adds two factors for a layer that is not there."""
    factors = {"lora_A.weight": torch.zeros(4, width), "lora_B.weight": torch.zeros(width, 4)}
    return lambda weights: weights | {f"{place}.{key}": w for key, w in factors.items()}


def halved(weights):
    return {key: w for key, w in weights.items() if key != min(k for k in weights if "_B" in k)}


def of_another_model(weights):
    return {key.replace("unet.", "transformer."): weight for key, weight in weights.items()}


def misshapen(weights):
    return {key: w[:, 1:].contiguous() if "_A" in key else w for key, w in weights.items()}


LAYER, TEXT_LAYER = (
    "unet.down_blocks.9.attentions.0.to_q",
    "text_encoder.encoder.layers.77.self_attn.q_proj",
)
MISFITS = {
    "stray": (stray(LAYER, 32), f"{LAYER}.lora_A.weight has no counterpart"),
    "stray text": (stray(TEXT_LAYER, 16), f"{TEXT_LAYER}.lora_A.weight has no counterpart"),
    "stray of another trainer": (
        lambda weights: as_kohya(stray(LAYER, 32)(weights)),
        "lora_unet_down_blocks_9_attentions_0_to_q.alpha has no counterpart",
    ),
    "halved": (halved, ".lora_A.weight has no counterpart"),
    "of another model": (of_another_model, "transformer.down_blocks."),
    "misshapen": (misshapen, ".lora_A.weight is (4, "),
    "undefined": (lambda weights: {key: w / 0 for key, w in weights.items()}, "NaN"),
    "a whole UNet": (
        lambda _: {"conv_in.weight": torch.zeros(2)},
        "conv_in.weight is no tensor of a LoRA",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_lora_that_does_not_fit_is_refused_with_a_key(checkpoint, lora, tmp_path, misfit):
    base, file, (action, words) = str(checkpoint()), tmp_path / hub.LORA, MISFITS[misfit]
    weights = lora()[1]
    if "trainer" in misfit:
        weights = {key: w for key, w in weights.items() if "unet" in key}
    save_file(action(weights), file)
    sentence = refusal(loading.load_any, str(file), base)
    assert sentence.startswith(f"The LoRA '{file}' does not fit '{base}': ") and words in sentence


@pytest.mark.parametrize("kinds", [("sdxl", "sd15"), ("sd15", "sdxl")], ids="-in-".join)
def test_a_lora_or_unet_of_another_architecture_is_refused(checkpoint, lora, kinds):
    made_for, base = map(checkpoint, kinds)
    sentence = refusal(loading.load_any, str(lora(kinds[0])[0]), str(base))
    assert "does not fit" in sentence and ".lora_A.weight " in sentence
    assert "does not read the text of" in refusal(loading.load_any, f"{made_for}/unet", str(base))


# -------------------------------------------------------------------------------------------------
# A model is loaded whole or not at all.


def lost(key):
    return lambda weights: {name: w for name, w in weights.items() if name != key}


LOST = {"unet": "conv_in.bias", "vae": "decoder.conv_out.weight"}
LOST |= {TEXT[0]: "encoder.layers.1.mlp.fc1.bias", TEXT[1]: "text_projection.weight"}


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
    assert same(loading.load_unet(str(folder)).state_dict(), unet.state_dict())
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    file = folder / "unet" / json.loads(index.read_text())["weight_map"]["conv_in.bias"]
    save_file(lost("conv_in.bias")(load_file(file)), file)
    sentence = refusal(loading.load_unet, str(folder))
    assert index.name in sentence and "lacks the weight conv_in.bias" in sentence


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_tensor_that_belongs_to_nothing_is_refused(copy, part):
    folder = copy("sd15")
    change(folder, part, lambda weights: weights | {"conv_in.stray": torch.zeros(2)})
    sentence = refusal(load_pipeline, str(folder))
    place = f"The {part} of '{folder}', {part}/{FILES[part]},"
    assert sentence == f"{place} has the tensor conv_in.stray, which its configuration lacks."


@both
def test_text_encoders_load_as_the_hub_has_them(copy, loaded, kind):
    def as_published(weights):
        names = {name: f"text_model.{name}" for name in weights if name[:5] != "text_"}
        weights = {names.get(name, name): w for name, w in weights.items()}
        return weights | {"text_model.embeddings.position_ids": torch.arange(16)[None]}

    folder = copy(kind)
    for part in TEXT if kind == "sdxl" else TEXT[:1]:
        change(folder, part, as_published)
    assert model.identity(load_pipeline(str(folder))) == model.identity(loaded(kind))
    change(folder, "text_encoder", lost("text_model.final_layer_norm.bias"))
    assert "lacks the weight final_layer_norm.bias" in refusal(load_pipeline, str(folder))


def test_a_vae_with_the_names_of_old_releases_loads(copy, loaded):
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
    assert model.identity(load_pipeline(str(folder))) == model.identity(loaded("sd15"))


def halve(folder, parts):
    """Leave of these parts a variant in fp16 alone."""
    for part in parts:
        file = folder / part / FILES[part]
        half = {name: w.half() for name, w in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()


@both
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_an_fp16_variant_is_taken_where_there_is_nothing_else(
    checkpoint, copy, loaded, on_hub, kind, place
):
    folder, parts = copy(kind), parts_of(loaded(kind))
    halve(folder, parts)
    name = on_hub if place == "hub" else str
    found = load_pipeline(name(folder))
    for part, exact in parts.items():
        rounded = {k: w.half().float() for k, w in exact.state_dict().items()}
        assert same(getattr(found, part).state_dict(), rounded)
    alone = {part: name(folder / part) for part in ("unet", "vae")}
    pipeline = load_pipeline(str(checkpoint(kind)), **alone)
    for part in alone:
        assert same(getattr(pipeline, part).state_dict(), getattr(found, part).state_dict())


def test_an_fp16_variant_is_left_alone_where_there_is_more_even_if_that_is_damaged(
    checkpoint, copy, loaded
):
    folder, whole, expected = copy(), checkpoint(), model.identity(loaded())
    halve(folder, FILES)
    for part, name in FILES.items():
        pickled = "pytorch_model.bin" if "text" in part else "diffusion_pytorch_model.bin"
        torch.save(load_file(whole / part / name), folder / part / pickled)
    assert model.identity(load_pipeline(str(folder))) == expected  # a pickle is more, too
    for part, name in FILES.items():
        shutil.copy(whole / part / name, folder / part / name)
    assert model.identity(load_pipeline(str(folder))) == expected
    for part, name in FILES.items():
        kept = (folder / part / name).read_bytes()
        (folder / part / name).write_bytes(kept[:-100])
        assert refusal(load_pipeline, str(folder)).startswith(f"Cannot load the {part} of ")
        (folder / part / name).write_bytes(kept)


# -------------------------------------------------------------------------------------------------
# Nothing that a model brings is run.


class Bait:
    """Unpickling it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def pickled(path, other=None):
    """Puts a bait into a pickle at the path, in place of another file."""

    def bait(folder, trap):
        if other:
            (folder / other).unlink()
        torch.save({"conv_in.weight": Bait(trap)}, folder / path)

    return bait


def lora_pickled(folder, trap):
    shutil.rmtree(folder / "unet")
    pickled("pytorch_lora_weights.bin", "model_index.json")(folder, trap)


def lora_in_disguise(folder, trap):
    (folder / "lora.safetensors").write_bytes(pickle.dumps(Bait(trap)))


def code(file, **entries):
    """Adds a file of code to the model, and names it in model_index.json."""

    def add(folder, trap):
        edit(folder / "model_index.json", **entries)
        (folder / file).write_text(f"open({str(trap)!r}, 'w')")

    return add


EVIL = ["evil", "Evil"]
UNET = pickled("unet/diffusion_pytorch_model.bin", f"unet/{DIFFUSION}")
ENCODER = pickled("text_encoder/pytorch_model.bin", f"text_encoder/{TRANSFORMER}")
CODE = {  # what is put into the folder, words of the sentence, what of the folder is loaded
    "unet": (UNET, "Unable to load weights from checkpoint file", "unet"),
    "text encoder": (ENCODER, "Weights only load failed", ""),
    "LoRA": (lora_pickled, "is not a pipeline, UNet or LoRA", ""),
    "LoRA in disguise": (lora_in_disguise, "is no whole .safetensors file", "lora.safetensors"),
    "a part": (code("unet/evil.py", unet=EVIL), "evil", ""),
    "the scheduler": (code("scheduler/evil.py", scheduler=EVIL), "custom code in evil.py", ""),
    "the pipeline": (code("evil.py", _class_name=EVIL), "is a ['evil', 'Evil']; StableDiff", ""),
    "by default": (code("None.py"), "contains custom code in None.py", ""),
}


@pytest.mark.parametrize("case", CODE)
def test_code_in_a_model_is_refused_and_not_run(checkpoint, copy, tmp_path, case):
    trap, folder, (add, words, path) = tmp_path / "trap", copy(), CODE[case]
    add(folder, trap)
    sentence = refusal(loading.load_any, str(folder / path), str(checkpoint()))
    assert words in sentence and str(folder / path) in sentence
    assert not trap.exists()


def test_the_bait_bites_where_pickles_are_trusted(tmp_path):
    torch.save({"x": Bait(tmp_path / "trap")}, tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "trap").exists()


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
def test_identity_changes_with_the_last_bit_of_any_weight(checkpoint, kind):
    pipeline = load_pipeline(str(checkpoint(kind)))
    seen = {model.identity(pipeline)}
    for module in parts_of(pipeline).values():
        weights = list(module.parameters())
        for weight in weights[:: max(len(weights) // 5, 1)]:
            weight.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
            identity = model.identity(pipeline)
            assert identity not in seen
            seen.add(identity)


def test_identity_changes_with_precision_and_with_a_lora(checkpoint, loaded, lora):
    base = str(checkpoint())
    found = [model.identity(loading.load_any(str(lora()[0]), base)), model.identity(loaded())]
    for dtype in (torch.float16, torch.bfloat16):
        found.append(model.identity(load_pipeline(base, dtype=dtype)))
    assert len(set(found)) == 4


def test_identity_sees_the_scale_of_a_lora(checkpoint, lora, tmp_path):
    unet = {key: w for key, w in lora()[1].items() if "unet" in key}
    found = []
    for alpha in (8.0, 9.0):
        save_file(as_kohya(unet, alpha), tmp_path / hub.LORA)
        found.append(model.identity(loading.load_any(str(tmp_path / hub.LORA), str(checkpoint()))))
    assert found[0] != found[1]


SETTINGS = {
    "scheduler/scheduler_config.json": {"beta_end": 0.013},
    "unet/config.json": {"norm_eps": 1e-4},
    "vae/config.json": {"scaling_factor": 0.2},
    "text_encoder/config.json": {"hidden_act": "gelu"},
    "model_index.json": {"force_zeros_for_empty_prompt": False},
}


@pytest.mark.parametrize("file", SETTINGS)
def test_identity_changes_with_a_setting_that_no_weight_shows(copy, loaded, file):
    folder = copy()
    edit(folder / file, **SETTINGS[file])
    assert model.identity(load_pipeline(str(folder))) != model.identity(loaded())


def test_identity_changes_with_the_class_of_the_scheduler(checkpoint):
    pipeline = load_pipeline(str(checkpoint("sdxl")))
    before = model.identity(pipeline)
    cls = diffusers.EulerAncestralDiscreteScheduler
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
    assert model.identity(pipeline) != before


def test_identity_does_not_depend_on_paths_and_versions_that_are_written_down(
    copy, loaded, monkeypatch
):
    expected, folder = model.identity(loaded()), copy()
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
def test_a_dropped_caption_among_others_is_encoded_as_if_alone(loaded, kind):
    pipeline = loaded(kind)
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


def random_pixels(n):
    seeded = torch.Generator().manual_seed(7)
    return torch.randint(256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=seeded)


def scaled(pixels):
    """From 0..255 to -1..1."""
    return pixels.float() / 127.5 - 1


def encoded_by_diffusers(pipeline, pixels):
    """What image to image starts from."""
    pixels = scaled(pixels)
    theirs = diffusers.StableDiffusionXLImg2ImgPipeline(**pipeline.components)
    options = dict(generator=generators(1, 2, 3), add_noise=False)
    return theirs.prepare_latents(pixels, None, 3, 1, torch.float32, "cpu", **options)


@both
def test_latents_are_scaled_draws_from_the_posterior(loaded, kind):
    pipeline, pixels = loaded(kind), random_pixels(2)
    latents = model.encode_images(pipeline, pixels, generators(4, 5))
    posterior = pipeline.vae.encode(scaled(pixels)).latent_dist
    noise = [torch.randn(1, *latents.shape[1:], generator=g) for g in generators(4, 5)]
    expected = (posterior.mean + posterior.std * torch.cat(noise)) * 0.18215
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(latents, model.encode_images(pipeline, pixels, generators(6, 7)))
    model.encode_images(pipeline, pixels)  # generators are optional


MOMENTS = {"latents_mean": [0.5, -1.0, 2.0, 0.0], "latents_std": [2.0, 0.5, 3.0, 1.0]}


def test_latents_are_those_of_diffusers_with_mean_and_std_and_without(loaded, copy):
    folder = copy("sdxl")
    edit(folder / "vae" / "config.json", **MOMENTS)
    pipeline, plain, latents = load_pipeline(str(folder)), loaded(), []
    for each in (plain, pipeline):
        latents.append(model.encode_images(each, random_pixels(3), generators(1, 2, 3)))
        assert latents[-1].shape == (3, 4, SIZE // 2, SIZE // 2)
        torch.testing.assert_close(latents[-1], encoded_by_diffusers(each, random_pixels(3)))
    assert not torch.allclose(*latents)

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


@pytest.mark.parametrize("at_once, expected", [(8, [8, 3]), (3, [3, 3, 3, 2]), (0.5, [1] * 11)])
def test_the_latent_of_an_image_does_not_depend_on_its_batch(
    at_once, expected, loaded, monkeypatch
):
    """Nor does its noise: each image has its own generator, wherever it stands."""
    pipeline, pixels, sizes = loaded(), random_pixels(11), []
    encode = pipeline.vae.encode
    alone = [
        model.encode_images(pipeline, pixels[i : i + 1], generators(i)).squeeze(0)
        for i in range(11)
    ]
    monkeypatch.setattr(model, "ENCODED", int(at_once * SIZE**2))
    monkeypatch.setattr(pipeline.vae, "encode", lambda x: sizes.append(len(x)) or encode(x))
    together = model.encode_images(pipeline, pixels, generators(*range(11)))
    assert sizes == expected
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-5)
    if at_once < 1:
        assert torch.equal(together, torch.stack(alone))


def test_eight_images_of_64_px_are_encoded_at_once_and_one_from_256_px_on():
    assert model.ENCODED // 64**2 == 8 and model.ENCODED // 256**2 == 0


def test_latents_of_an_fp16_vae_are_fp32(checkpoint, loaded):
    pipeline = load_pipeline(str(checkpoint("sd15")), dtype=torch.float16)
    exact = loaded("sd15")
    latents = model.encode_images(pipeline, random_pixels(1), generators(1))
    assert latents.dtype == torch.float32
    posterior = exact.vae.encode(scaled(random_pixels(1))).latent_dist
    mean, spread = posterior.mean * 0.18215, posterior.std.max() * 0.18215
    assert (latents - mean).abs().max() < 5 * spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_level_of_a_pixel_reaches_the_vae_as_level_over_127_and_a_half_less_1(
    dtype, checkpoint, monkeypatch
):
    """In fp32, as float pictures from the workers would be, and rounded once to the VAE's dtype."""
    pipeline, seen = load_pipeline(str(checkpoint("sd15")), dtype=dtype), []
    encode = pipeline.vae.encode
    monkeypatch.setattr(pipeline.vae, "encode", lambda x: seen.append(x) or encode(x))
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    model.encode_images(pipeline, torch.from_numpy(levels))
    expected = levels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert torch.equal(seen[0], torch.from_numpy(expected).to(dtype))
    assert expected.min() == -1 and expected.max() == 1


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
def test_an_epsilon_model_predicts_its_raw_output(loaded, kind):
    pipeline = loaded(kind)
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
def test_the_schedule_is_the_one_of_the_checkpoint(loaded, kind):
    abar = model.alphas_cumprod(loaded(kind))
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
def test_samples_are_those_of_the_pipeline_itself(loaded, kind):
    pipeline = loaded(kind)
    options = dict(num_inference_steps=3, guidance_scale=4.0, generator=generators(5, 6, 7))
    theirs = pipeline(CAPTIONS, **options).images
    ours = model.sample(pipeline, CAPTIONS, [5, 6, 7], 3, 4.0)
    assert [image.size for image in ours] == [(SIZE, SIZE)] * 3
    assert levels(ours, theirs) == 0


@both
def test_a_sample_depends_on_its_seed_but_not_on_the_batch(loaded, kind):
    pipeline = loaded(kind)
    prompts, seeds = CAPTIONS + CAPTIONS[:1], [5, 6, 7, 8]
    together = model.sample(pipeline, prompts, seeds, 2, 4.0, batch=16)
    for batch in (1, 3):
        assert levels(together, model.sample(pipeline, prompts, seeds, 2, 4.0, batch)) <= 1
    assert levels(together[:1], together[3:]) > 10  # same prompt, another seed
    assert levels(together[:1], model.sample(pipeline, prompts[1:2], [5], 2, 4.0)) > 0


@pytest.mark.parametrize("limit, expected", [(10**6, [3]), (2 * SIZE**2, [2, 1]), (1, [1, 1, 1])])
def test_the_vae_decodes_as_many_images_at_once_as_the_limit_allows(
    loaded, monkeypatch, limit, expected
):
    pipeline = loaded()
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
@pytest.mark.parametrize("part", ["UNet", "VAE"])
def test_what_is_not_finite_is_an_error_and_no_black_picture(checkpoint, kind, part):
    pipeline = load_pipeline(str(checkpoint(kind)), dtype=torch.bfloat16)
    layer = pipeline.unet.conv_out if part == "UNet" else pipeline.vae.decoder.conv_out
    dtype = "bfloat16" if part == "UNet" else ("float32" if kind == "sdxl" else "float16")
    for value in (float("nan"), float("inf")):
        layer.bias[0] = value
        sentence = refusal(draw, pipeline)
        assert f"The {part} draws" in sentence and f"not finite in {dtype};" in sentence


@both
def test_samples_in_half_precision_are_near_those_in_fp32(checkpoint, loaded, kind):
    exact = loaded(kind)
    rounded = load_pipeline(str(checkpoint(kind)), dtype=torch.bfloat16)
    assert levels(draw(exact), draw(rounded)) < 25


@both
def test_a_saved_pipeline_loads_without_arguments_and_samples_the_same(checkpoint, tmp_path, kind):
    pipeline = load_pipeline(str(checkpoint(kind)))
    unet, before, weights = pipeline.unet, draw(pipeline), other_unet(checkpoint(kind))
    saving.save_pipeline(pipeline, weights, tmp_path / "policy")
    assert pipeline.unet is unet and levels(before, draw(pipeline)) == 0

    saved = KINDS[kind].from_pretrained(tmp_path / "policy")
    saved.set_progress_bar_config(disable=True)
    assert same(saved.unet.state_dict(), weights)
    unet.load_state_dict(weights)
    assert levels(before, draw(pipeline)) > 0
    assert levels(draw(pipeline), draw(saved)) == 0
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
        text = "text_encoder"
        change(folder, text, lambda old: {f"text_model.{name}": w for name, w in old.items()})
    if kind == "sd15":  # transformers 5 would load it as a class of its own
        file = folder / "feature_extractor" / "preprocessor_config.json"
        file.parent.mkdir()
        file.write_text('{"image_processor_type": "CLIPImageProcessor"}')
        edit(folder / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    pipeline = load_pipeline(str(folder))
    saving.save_pipeline(pipeline, pipeline.unet.state_dict(), tmp_path / "out")
    assert_readable_by_older_releases(tmp_path / "out", pipeline.tokenizer)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["feature_extractor"] == [None, None]
    assert model.identity(load_pipeline(str(tmp_path / "out"))) == model.identity(pipeline)


def test_the_embedded_model_and_one_pretrained_anew_have_what_older_releases_read(
    tmp_path, monkeypatch
):
    for training in ("train_vae", "train_unet"):
        monkeypatch.setattr(pretrain, training, lambda *_: None)
    pretrain.pretrain(tmp_path / "anew", n=1)
    tiny = load_pipeline("tiny").tokenizer
    shutil.copytree(hub.PRESETS["tiny"], tmp_path / "tiny")
    for name in ("tiny", "anew"):
        assert_readable_by_older_releases(tmp_path / name, tiny)


def test_a_disk_that_is_full_for_the_tokenizer_is_an_os_error(loaded, tmp_path, monkeypatch):
    pipeline = loaded()
    monkeypatch.setattr(pipeline, "save_pretrained", pipeline.tokenizer.save_pretrained)
    with small_disk(500), pytest.raises(OSError, match="File too large"):
        saving.write_pipeline(pipeline, tmp_path)


def test_weights_are_saved_in_the_precision_they_have(checkpoint, loaded, tmp_path):
    weights = {k: w.bfloat16() for k, w in other_unet(checkpoint("sdxl")).items()}
    saving.save_pipeline(loaded(), weights, tmp_path)
    assert same(load_file(tmp_path / "unet" / DIFFUSION), weights)


def test_weights_of_another_unet_are_refused(checkpoint, loaded, tmp_path):
    pipeline, weights = loaded(), other_unet(checkpoint())
    unet = pipeline.unet
    weights.pop("conv_in.weight")
    for save, what in ((saving.save_pipeline, pipeline), (saving.save_unet, dict(unet.config))):
        with pytest.raises(RuntimeError, match="conv_in.weight"):
            save(what, weights, tmp_path)
    assert pipeline.unet is unet and not list(tmp_path.iterdir())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unet_saved_alone_loads_alone_with_its_weights_and_settings(
    checkpoint, loaded, tmp_path, kind, dtype
):
    weights = {k: w.to(dtype) for k, w in other_unet(checkpoint(kind)).items()}
    config, folder = loaded(kind).unet.config, tmp_path / "unet alone"
    saving.save_unet(config, weights, folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", DIFFUSION}
    assert same(load_file(folder / DIFFUSION), weights)
    alone = loading.load_unet(str(folder), dtype)
    assert same(alone.state_dict(), weights)
    visible = lambda c: {k: v for k, v in c.items() if k[0] != "_"}  # noqa: E731
    assert visible(alone.config) == visible(config)
    assert hub.kind(str(folder)) == "unet"
