"""Laws of LoRA files in other programs' keys: weights/loras.py, training/lora.save.

What a file does is computed here by code and tables of its own: W + alpha/rank up down."""

import json
import os

import diffusers
import numpy as np
import pytest
import torch
from conftest import refusal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora import adapted, both, fresh, pipeline_of, predict, saved

import model
from lab.architectures import SD15, SDXL
from system import hub
from system.files import replacing
from training import lora
from weights import loading
from weights.names import original_name

# The layers of the random checkpoints (conftest.py: one layer a block), as kohya's sd-scripts name
# them, which train SDXL in its original layout, and SD1.5 in that of diffusers.
ATTENTIONS = {
    "input_blocks_3_1": "down_blocks.1.attentions.0",
    "middle_block_1": "mid_block.attentions.0",
    "output_blocks_0_1": "up_blocks.0.attentions.0",
    "output_blocks_1_1": "up_blocks.0.attentions.1",
}
IN_ATTENTION = {
    "proj_in": "proj_in",
    "proj_out": "proj_out",
    "transformer_blocks_0_attn1_to_q": "transformer_blocks.0.attn1.to_q",
    "transformer_blocks_0_attn1_to_k": "transformer_blocks.0.attn1.to_k",
    "transformer_blocks_0_attn1_to_v": "transformer_blocks.0.attn1.to_v",
    "transformer_blocks_0_attn1_to_out_0": "transformer_blocks.0.attn1.to_out.0",
    "transformer_blocks_0_attn2_to_q": "transformer_blocks.0.attn2.to_q",
    "transformer_blocks_0_attn2_to_k": "transformer_blocks.0.attn2.to_k",
    "transformer_blocks_0_attn2_to_v": "transformer_blocks.0.attn2.to_v",
    "transformer_blocks_0_attn2_to_out_0": "transformer_blocks.0.attn2.to_out.0",
    "transformer_blocks_0_ff_net_0_proj": "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks_0_ff_net_2": "transformer_blocks.0.ff.net.2",
}
ELSEWHERE = {  # LoCon trains these as well
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_3_0_emb_layers_1": "down_blocks.1.resnets.0.time_emb_proj",
    "middle_block_0_in_layers_2": "mid_block.resnets.0.conv1",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_1_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_2_0_in_layers_2": "up_blocks.1.resnets.0.conv1",
    "output_blocks_3_0_skip_connection": "up_blocks.1.resnets.1.conv_shortcut",
    "out_2": "conv_out",
    "time_embed_2": "time_embedding.linear_2",
}
IN_TEXT = {
    "layers_0_self_attn_q_proj": "layers.0.self_attn.q_proj",
    "layers_1_self_attn_out_proj": "layers.1.self_attn.out_proj",
    "layers_1_mlp_fc1": "layers.1.mlp.fc1",
}


def table(kind: str, original: bool | None = None) -> dict[str, tuple[str, str]]:
    """{kohya's name of a layer: (part, path)}; original: the UNet's names are of that layout."""
    original = kind == "sdxl" if original is None else original
    found = {}
    for theirs, ours in ATTENTIONS.items():
        block = theirs if original else ours.replace(".", "_")
        for end, path in IN_ATTENTION.items():
            found[f"lora_unet_{block}_{end}"] = ("unet", f"{ours}.{path}")
    for theirs, ours in ELSEWHERE.items():
        found[f"lora_unet_{theirs if original else ours.replace('.', '_')}"] = ("unet", ours)
    for end, path in IN_TEXT.items():
        first = "te1" if kind == "sdxl" else "te"
        found[f"lora_{first}_text_model_encoder_{end}"] = ("text_encoder", f"encoder.{path}")
        if kind == "sdxl":  # transformers 5 kept text_model. in the second encoder alone
            name = f"lora_te2_text_model_encoder_{end}"
            found[name] = ("text_encoder_2", f"text_model.encoder.{path}")
    return found


@torch.no_grad()
def apply_by_hand(pipeline, file, names: dict[str, tuple[str, str]]):
    """W + alpha/rank up down, layer by layer; every key of the file is used."""
    tensors = load_file(file)
    for name in sorted({key.split(".")[0] for key in tensors}):
        part, path = names[name]
        down = tensors.pop(f"{name}.lora_down.weight").float()
        up = tensors.pop(f"{name}.lora_up.weight").float()
        alpha = tensors.pop(f"{name}.alpha")
        assert alpha.shape == ()
        weight = getattr(pipeline, part).get_submodule(path).weight
        update = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view_as(weight)
        weight += alpha.item() / len(down) * update
    assert not tensors


def write_by_hand(file, pipeline, names: dict, dtype=torch.float32, alpha=3.0):
    """A LoRA in kohya's keys of ranks 2, 3, 4, 5 in turn, and that alpha."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for n, (name, (part, path)) in enumerate(names.items()):
        out, *into = getattr(pipeline, part).get_submodule(path).weight.shape
        shapes = {"down": (2 + n % 4, *into), "up": (out, 2 + n % 4, *[1] * (len(into) - 1))}
        for kind, shape in shapes.items():
            drawn = 0.2 * torch.randn(shape, generator=generator)
            tensors[f"{name}.lora_{kind}.weight"] = drawn.to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    save_file(tensors, file)


def weights_of(pipeline) -> dict[str, torch.Tensor]:
    parts = ("unet", "text_encoder", "text_encoder_2")
    return {
        f"{part}.{key}": weight
        for part in parts
        if getattr(pipeline, part, None) is not None
        for key, weight in getattr(pipeline, part).state_dict().items()
    }


def assert_near(left: dict, right: dict, **tolerance):
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], **tolerance)


def draw(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return np.asarray(model.sample(pipeline, ["a red circle"], [3], 2, 2.0)[0]).astype(int)


# -------------------------------------------------------------------------------------------------
# What is written.


@pytest.mark.parametrize("kind, alpha", [("sdxl", 6.0), ("sd15", 2.5)])
def test_both_files_of_a_lora_give_the_same_pictures(checkpoint, tmp_path, kind, alpha):
    unet = adapted(checkpoint(kind), alpha)
    for weight in lora.trainable(unet).values():
        weight.data = weight.data.half().float()  # the second file is in fp16
    ours, theirs, plain = (pipeline_of(checkpoint(kind), kind) for _ in range(3))
    ours.load_lora_weights(saved(unet, tmp_path))  # of the two files in the folder
    assert torch.equal(predict(ours.unet, kind), predict(unet, kind))
    apply_by_hand(theirs, tmp_path / hub.KOHYA_LORA, table(kind))
    expected = predict(unet, kind)
    torch.testing.assert_close(predict(theirs.unet, kind), expected, rtol=1e-4, atol=1e-5)
    assert abs(draw(theirs) - draw(ours)).max() <= 1
    assert abs(draw(plain) - draw(ours)).max() > 10


@both
def test_the_second_file_is_the_first_in_fp16_as_diffusers_reads_it(checkpoint, tmp_path, kind):
    unet = adapted(checkpoint(kind))
    saved(unet, tmp_path, dtype=torch.float16)
    found = []
    for name in (hub.LORA, hub.KOHYA_LORA):
        pipeline = pipeline_of(checkpoint(kind), kind)
        pipeline.load_lora_weights(tmp_path, weight_name=name)
        found.append(predict(pipeline.unet.float(), kind))
    assert torch.equal(*found)


def test_the_second_file_says_what_it_is(checkpoint, tmp_path):
    for kind, version, architecture in (
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
        ("sd15", "sd_v1", "stable-diffusion-v1/lora"),
    ):
        saved(adapted(checkpoint(kind), 2.5), tmp_path / kind)
        with safe_open(tmp_path / kind / hub.KOHYA_LORA, "pt") as file:
            said = file.metadata()
        assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("4", "2.5")
        assert said["ss_base_model_version"] == version and said["modelspec.title"] == "a title"
        assert said["modelspec.architecture"] == architecture


def test_names_of_the_full_size_models_are_those_of_their_loras():
    """Transformer blocks by place, as in LoRA files of SDXL; a few names of other layers."""
    deep = ["input_blocks_7_1", "input_blocks_8_1", "middle_block_1"]
    deep += ["output_blocks_0_1", "output_blocks_1_1", "output_blocks_2_1"]
    shallow = ["input_blocks_4_1", "input_blocks_5_1"]
    shallow += ["output_blocks_3_1", "output_blocks_4_1", "output_blocks_5_1"]
    blocks = dict.fromkeys(deep, 10) | dict.fromkeys(shallow, 2)
    with torch.device("meta"):
        sdxl, sd15 = (diffusers.UNet2DConditionModel(**one) for one in (SDXL, SD15))
    names = [name for name, _ in sdxl.named_modules() if name.endswith("attn1.to_q")]
    found = {original_name(name, sdxl.config).replace(".", "_") for name in names}
    ends = "transformer_blocks_{}_attn1_to_q"
    assert found == {f"{at}_{ends.format(n)}" for at, count in blocks.items() for n in range(count)}
    for unet, ours, theirs in (
        (sdxl, "down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"),
        (sdxl, "up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        (sdxl, "up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
        (sd15, "up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        (sd15, "up_blocks.3.attentions.2.proj_in", "output_blocks.11.1.proj_in"),
        (sd15, "down_blocks.3.resnets.1.time_emb_proj", "input_blocks.11.0.emb_layers.1"),
    ):
        assert unet.get_submodule(ours) and original_name(ours, unet.config) == theirs


def test_files_have_the_mode_that_the_umask_asks_for(checkpoint, tmp_path):
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    with replacing(tmp_path / "folder") as scratch:
        saved(adapted(checkpoint()), scratch)
        fresh(checkpoint()).save_pretrained(scratch / "unet")
    files = [file for file in (tmp_path / "folder").rglob("*") if file.is_file()]
    assert len(files) == 4 and {file.stat().st_mode for file in files} == {mode}
    assert os.access(files[0], os.R_OK)


# -------------------------------------------------------------------------------------------------
# What is read.


@pytest.mark.parametrize(
    "kind, original, dtype",
    [("sdxl", True, torch.float16), ("sdxl", False, torch.float32), ("sd15", False, torch.float16),
     ("sd15", True, torch.float32)],
)  # fmt: skip
def test_a_lora_in_kohyas_keys_is_merged_as_by_hand(checkpoint, tmp_path, kind, original, dtype):
    """With both text encoders and convolutions, alpha 3, and ranks that differ."""
    expected, file = pipeline_of(checkpoint(kind), kind), tmp_path / "kohya.safetensors"
    names = table(kind, original)
    write_by_hand(file, expected, names, dtype)
    start = {key: weight.clone() for key, weight in weights_of(expected).items()}
    apply_by_hand(expected, file, names)
    found = loading.load_any(str(file), str(checkpoint(kind)))  # as NAME=PATH of evaluate.py
    assert_near(weights_of(found), weights_of(expected), rtol=1e-5, atol=1e-6)
    moved = {key for key, weight in weights_of(found).items() if not weight.equal(start[key])}
    assert moved == {f"{part}.{path}.weight" for part, path in names.values()}
    assert abs(draw(found) - draw(expected)).max() <= 1


@pytest.mark.parametrize("kind, original", [("sdxl", True), ("sdxl", False), ("sd15", False)])
def test_a_lora_in_kohyas_keys_is_trained_on_and_written_again(
    checkpoint, tmp_path, kind, original
):
    expected, file = pipeline_of(checkpoint(kind), kind), tmp_path / "kohya.safetensors"
    names = {name: at for name, at in table(kind, original).items() if at[0] == "unet"}
    write_by_hand(file, expected, names, torch.float16)
    apply_by_hand(expected, file, names)
    unet, base = fresh(checkpoint(kind)), fresh(checkpoint(kind))
    lora.check(str(file), "continue", "it", unet.config)
    lora.adopt(unet, str(file), "it")
    assert len(lora.trainable(unet)) == 2 * len(names)
    torch.testing.assert_close(predict(unet, kind), predict(expected.unet, kind), **CLOSE)
    assert torch.equal(predict(lora.AdapterOff(unet), kind), predict(base, kind))
    again, theirs = pipeline_of(checkpoint(kind), kind), pipeline_of(checkpoint(kind), kind)
    again.load_lora_weights(saved(unet, tmp_path / "out"))
    assert torch.equal(predict(again.unet, kind), predict(unet, kind))
    apply_by_hand(theirs, tmp_path / "out" / hub.KOHYA_LORA, table(kind))
    torch.testing.assert_close(predict(theirs.unet, kind), predict(unet, kind), **CLOSE)


CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def test_peft_and_diffusers_of_2023_name_the_same_layers(checkpoint, tmp_path):
    """Without alpha the scale is 1; with peft's settings, what they say."""
    unet, text = (
        "unet.mid_block.attentions.0.transformer_blocks.0",
        "text_encoder.text_model.encoder",
    )
    factors = torch.randn(2, 32), torch.randn(32, 2)
    small = torch.randn(2, 16), torch.randn(16, 2)
    peft = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_out.0": 5}}
    rs = {"unet.lora_alpha": 8, "unet.use_rslora": True}
    ends = [("lora_A.weight", "lora_B.weight"), ("lora.down.weight", "lora.up.weight")]
    for (down, up), settings, scale in (
        (ends[0], {}, 1), (ends[1], {}, 1), (ends[0], peft, 2.5), (ends[0], rs, 8 / 2**0.5),
    ):  # fmt: skip
        file = tmp_path / "it.safetensors"
        layers = {f"{unet}.attn1.to_out.0": factors, f"{text}.layers.0.self_attn.k_proj": small}
        tensors = {f"{at}.{down}": a for at, (a, _) in layers.items()}
        tensors |= {f"{at}.{up}": b for at, (_, b) in layers.items()}
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps(settings)})
        expect(checkpoint, file, factors[1] @ factors[0] * scale, small[1] @ small[0])
    old = {
        "unet": f"{unet}.attn1.processor.to_out_lora",
        "te": f"{text}.layers.0.self_attn.to_k_lora",
    }
    tensors = {f"{old['unet']}.down.weight": factors[0], f"{old['unet']}.up.weight": factors[1]}
    tensors |= {f"{old['te']}.down.weight": small[0], f"{old['te']}.up.weight": small[1]}
    save_file(tensors, file)
    expect(checkpoint, file, factors[1] @ factors[0], small[1] @ small[0])


def expect(checkpoint, file, of_unet, of_text):
    base, found = (loading.load_any(p, str(checkpoint())) for p in (str(checkpoint()), str(file)))
    for part, path, update in (
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", of_unet),
        ("text_encoder", "encoder.layers.0.self_attn.k_proj", of_text),
    ):
        before, after = (getattr(p, part).get_submodule(path).weight for p in (base, found))
        torch.testing.assert_close(after - before, update, rtol=1e-4, atol=1e-4)


LAYER = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    "end, kind",
    [("hada_w1_a", "a LoHa"), ("lokr_w1", "a LoKr"), ("dora_scale", "a DoRA"),
     ("lora_magnitude_vector", "a DoRA"), ("lora_mid.weight", "a LoCon in Tucker's form")],
)  # fmt: skip
@pytest.mark.parametrize("start", ["continue", "merge"])
def test_what_is_no_plain_lora_is_refused_before_weights_are_loaded(
    checkpoint, tmp_path, end, kind, start
):
    file = tmp_path / "it.safetensors"
    save_file({f"{LAYER}.{end}": torch.ones(2, 2), f"{LAYER}.alpha": torch.ones(())}, file)
    sentence = refusal(lora.check, str(file), start, "it", fresh(checkpoint()).config)
    assert sentence.startswith(f"The LoRA '{file}' is {kind} ({LAYER}.{end}); only plain LoRA")


def test_a_layer_that_is_named_twice_is_refused(checkpoint, tmp_path):
    file, key = tmp_path / "it.safetensors", "lora_down.weight"
    twice = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.{key}": torch.ones(2, 32) for name in (LAYER, twice)}, file)
    sentence = refusal(loading.load_any, str(file), str(checkpoint()))
    assert f"{LAYER}.{key} and {twice}.{key} are of one layer" in sentence
