"""Laws of model.py, on small random checkpoints of both architectures.

The references are diffusers' own: its pipelines' __call__, schedulers and loaders."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import model
from model import ModelError, load_pipeline

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
    """Whether two state dicts, or nested conditionings, hold the same tensors."""
    assert left.keys() == right.keys()
    return all(
        same(left[key], right[key])
        if isinstance(left[key], dict)
        else torch.equal(left[key], right[key])
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
    assert model.architecture(str(folder)) == kind
    for part in ("unet", "vae", "scheduler"):
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        written = json.loads((folder / part / file).read_text())
        assert model.read_config(str(folder), part) == written
    assert model.read_config(str(folder / "unet"), "unet")["sample_size"] == 8
    assert model.read_config(str(folder / "vae"), "vae")["block_out_channels"] == [8, 16]


@both
def test_parameters_are_counted_without_weights(checkpoint, kind):
    config = model.read_config(str(checkpoint(kind)), "unet")
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
    no_weights: "Cannot load the pipeline",
    no_vae: "Cannot load the pipeline",
    no_text_weights: "Cannot load the pipeline",
    truncated_text_weights: "Cannot load the pipeline",
    flow_matching: "has a FlowMatchEulerDiscreteScheduler, which knows no alphas_cumprod.",
    sample_prediction: "predicts 'sample'; epsilon and v_prediction can be trained here.",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_the_model_is_one_sentence_that_names_it(copy, mistake):
    name = mistake(copy())
    with pytest.raises(ModelError) as error:
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
        with pytest.raises(ModelError) as error:
            load_pipeline(str(checkpoint("sdxl")), **{part: name})
        assert f"'{name}'" in str(error.value) and words in str(error.value)
        assert "\n" not in str(error.value)


def test_a_unet_that_reads_other_text_is_refused(checkpoint, tmp_path):
    sdxl, sd15 = checkpoint("sdxl"), checkpoint("sd15")
    config = diffusers.UNet2DConditionModel.load_config(sdxl, subfolder="unet")
    unpooled = diffusers.UNet2DConditionModel.from_config(config, addition_embed_type=None)
    unpooled.save_pretrained(tmp_path)  # of the right width
    for folder, unet in [(sdxl, sd15), (sd15, sdxl), (sdxl, tmp_path), (sdxl, sdxl / "vae")]:
        with pytest.raises(ModelError, match="does not read the text of") as error:
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
        assert pipeline.vae.dtype == torch.float16


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
    assert pipeline.vae.dtype == expected
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == dtype
    if kind == "sdxl":
        assert pipeline.text_encoder_2.dtype == dtype


def test_in_fp32_every_part_is_fp32(checkpoint):
    pipeline = load_pipeline(str(checkpoint("sd15")))
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}


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
    assert model.architecture(str(tmp_path / "policy")) == kind  # and trains on from there
    assert same(load_pipeline(str(tmp_path / "policy")).unet.state_dict(), weights)


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
