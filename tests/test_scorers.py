"""Each scorer against a computation by hand on the same weights; files that must be refused.

The checkpoints are tiny and random, in the published layouts. All start as a state dict in
open_clip's layout, and that is what the computations by hand read."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import RemoteEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

import toy
from evaluation import published, scorers
from lab import pretrain
from system import hub
from system.files import UserError

SIZE, PATCH, LENGTH, DIM, HEADS = 32, 8, 10, 16, 2
LEARNED = ["aesthetic", "pickscore", "hps", "hps-v2.0", "clip"]
H, L = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14"
PICKSCORE = "yuvalkirstain/PickScore_v1/model.safetensors"
HPS, HPS_V20 = "xswu/HPSv2/HPS_v2.1_compressed.pt", "xswu/HPSv2/HPS_v2_compressed.pt"
HEAD = "camenduru/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
PROMPTS = ["a red circle on a white background", "cross", "a blue square", "white " * 30]

# -------------------------------------------------------------------------------------------------
# Random checkpoints.


def open_clip_weights(seed: int, vocab: int) -> dict:
    """A random state dict in open_clip's layout: vision 32 wide, text 16, both of two layers."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape, scale=0.3: scale * torch.randn(shape, generator=g)  # noqa: E731
    sd = {
        "visual.class_embedding": draw(32),
        "visual.positional_embedding": draw((SIZE // PATCH) ** 2 + 1, 32),
        "visual.proj": draw(32, DIM),
        "visual.conv1.weight": draw(32, 3, PATCH, PATCH, scale=0.1),
        "positional_embedding": draw(LENGTH, DIM),
        "text_projection": draw(DIM, DIM),  # square, as published: its shape tells no direction
        "token_embedding.weight": draw(vocab, DIM),
        "logit_scale": torch.tensor(1.3) + draw()[()],
    }
    norms = [("visual.ln_pre", 32), ("visual.ln_post", 32), ("ln_final", DIM)]
    for tower, width in (("visual.transformer", 32), ("transformer", DIM)):
        for block in (f"{tower}.resblocks.{i}." for i in range(2)):
            norms += [(block + "ln_1", width), (block + "ln_2", width)]
            sd[block + "attn.in_proj_weight"] = draw(3 * width, width)
            sd[block + "attn.in_proj_bias"] = draw(3 * width)
            for name, rows, columns in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 4 * width, width),
                ("mlp.c_proj", width, 4 * width),
            ):
                sd[block + name + ".weight"] = draw(rows, columns)
                sd[block + name + ".bias"] = draw(rows)
    for name, width in norms:
        sd[name + ".weight"], sd[name + ".bias"] = 1 + draw(width), draw(width)
    return sd


def as_transformers(sd: dict, folder: Path) -> dict:
    """The same weights for the CLIPModel of a configuration. The names are those of the table under
    test: were it wrong, the model would not compute what the computations by hand do."""
    names = list(CLIPModel(CLIPConfig.from_pretrained(folder)).state_dict())
    out = {}
    for name, parts in scorers.open_clip_names(names).items():
        whole = sd[name].T if name in scorers.TRANSPOSED else sd[name]
        pieces = whole.chunk(3) if len(parts) > 1 else [whole]
        out |= dict(zip(parts, pieces, strict=True))
    return {name: x.contiguous().clone() for name, x in out.items()}


def write_clip(folder: Path, vocab: dict, end: int, act: str):
    """config.json and preprocessor_config.json as old repositories have them, and a vocabulary."""
    folder.mkdir(parents=True)
    common = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "hidden_act": act}
    text = {"hidden_size": DIM, "intermediate_size": 4 * DIM, "vocab_size": len(vocab)}
    text |= {"max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": end}
    vision = {"hidden_size": 32, "intermediate_size": 128, "image_size": SIZE, "patch_size": PATCH}
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "torch_dtype": "float16"}
    config |= {"projection_dim": DIM, "text_config": text | common, "text_config_dict": None}
    config |= {"vision_config": vision | common, "vision_config_dict": None}
    (folder / "config.json").write_text(json.dumps(config))
    crop = {"crop_size": SIZE, "size": SIZE, "resample": 3, "do_resize": True}
    crop |= {"do_center_crop": True, "do_normalize": True}
    crop |= {"image_mean": MEAN.flatten().tolist(), "image_std": STD.flatten().tolist()}
    (folder / "preprocessor_config.json").write_text(json.dumps(crop))
    (folder / "vocab.json").write_text(json.dumps(vocab))


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(folder, {repository or file: open_clip weights}, vocabulary); no test writes into it."""
    folder = tmp_path_factory.mktemp("hub")
    pretrain.write_tokenizer(folder / "words")
    words = list(json.loads((folder / "words" / "vocab.json").read_text()))
    words = words[2:] + words[:2]  # as in CLIP's vocabulary, the end token is the last
    vocab = {word: i for i, word in enumerate(words)}
    names = {H: 0, "PickScore": 1, HPS: 2, HPS_V20: 3, L: 4}
    weights = {name: open_clip_weights(seed, len(vocab)) for name, seed in names.items()}
    write_clip(folder / H, vocab, 2, "gelu")
    write_clip((folder / PICKSCORE).parent, vocab, len(vocab) - 1, "gelu")
    write_clip(folder / L, vocab, 2, "quick_gelu")
    for repository in (H, L):
        shutil.copy(folder / "words" / "merges.txt", folder / repository)
    buffers = {"text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}
    save_file(as_transformers(weights[H], folder / H) | buffers, folder / H / "model.safetensors")
    save_file(as_transformers(weights["PickScore"], folder / H), folder / PICKSCORE)
    torch.save(as_transformers(weights[L], folder / L) | buffers, folder / L / "pytorch_model.bin")
    (folder / HPS).parent.mkdir(parents=True)
    for file in (HPS, HPS_V20):
        weights[file] = {name: x.half() for name, x in weights[file].items()}
        torch.save({"state_dict": weights[file], "epoch": 1}, folder / file)
    g, widths = torch.Generator().manual_seed(5), [DIM, 24, 12, 8, 6, 1]
    weights[HEAD] = {}
    for layer, rows, columns in zip((0, 2, 4, 6, 7), widths[1:], widths[:-1], strict=True):
        weights[HEAD][f"layers.{layer}.weight"] = 0.3 * torch.randn(rows, columns, generator=g)
        weights[HEAD][f"layers.{layer}.bias"] = torch.randn(rows, generator=g)
    (folder / HEAD).parent.mkdir(parents=True)
    torch.save(weights[HEAD], folder / HEAD)
    return folder, weights, vocab


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the folder, to be spoiled."""
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Coarse and fine random structure, so that a wrong crop or a wrong filter shows."""
    g = torch.Generator().manual_seed(100 * width + height)
    fine = torch.randint(0, 256, (height, width, 3), generator=g).byte().numpy()
    coarse = Image.fromarray(fine[:3, :4]).resize((width, height), Image.Resampling.BICUBIC)
    return Image.blend(Image.fromarray(fine), coarse, 0.7).convert(mode)


def pictures() -> list[Image.Image]:
    return [noise(90, 51), noise(37, 70), noise(64, 64), noise(20, 13)]


# -------------------------------------------------------------------------------------------------
# By hand: preprocessing, tokens, the two towers of open_clip.


def to_pixels(image) -> torch.Tensor:
    data = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.float64)
    return data.reshape(image.height, image.width, 3).permute(2, 0, 1) / 255


def cropped(images) -> torch.Tensor:
    """Short side to 32, bicubic by PIL; the 32 x 32 in the middle; channels normalised."""
    rows = []
    for image in images:
        short = min(image.size)
        width, height = (SIZE if s == short else int(SIZE * s / short) for s in image.size)
        left, top = (width - SIZE) // 2, (height - SIZE) // 2
        image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        rows.append(to_pixels(image.crop((left, top, left + SIZE, top + SIZE))))
    return ((torch.stack(rows) - MEAN) / STD).float()


def cubic(n: int, m: int) -> torch.Tensor:
    """(m, n): n samples to m by Keys' cubic of a = -0.75 on four neighbours, whatever the scale.

    Sample i lies at (i + 0.5) n / m - 0.5; beyond the edge the last sample repeats."""
    out = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        x = (i + 0.5) * n / m - 0.5
        for k in range(math.floor(x) - 1, math.floor(x) + 3):
            d, a = abs(x - k), -0.75
            inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
            outer = a * (d**3 - 5 * d**2 + 8 * d - 4)
            out[i, min(max(k, 0), n - 1)] += inner if d <= 1 else outer
    return out


def padded(images) -> torch.Tensor:
    """Long side to 32, without antialiasing; zeros above and below, or left and right."""
    canvas = torch.zeros(len(images), 3, SIZE, SIZE, dtype=torch.float64)
    for row, image in zip(canvas, images, strict=True):
        width, height = (round(s * SIZE / max(image.size)) for s in image.size)
        small = cubic(image.height, height) @ to_pixels(image) @ cubic(image.width, width).T
        top, left = (SIZE - height) // 2, (SIZE - width) // 2
        row[:, top : top + height, left : left + width] = small
    return ((canvas - MEAN) / STD).float()


def tokens_of(prompts, vocab: dict) -> torch.Tensor:
    """One token a word, cut to the length with the end token kept; zeros fill up."""
    ids = torch.zeros(len(prompts), LENGTH, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        words = [vocab[word + "</w>"] for word in prompt.split()][: LENGTH - 2]
        words = [vocab["<|startoftext|>"], *words, vocab["<|endoftext|>"]]
        row[: len(words)] = torch.tensor(words)
    return ids


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def transformer(sd, prefix: str, x, mask, act):
    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], sd[name + ".weight"], sd[name + ".bias"])

    def linear(name, x, dot="."):
        return x @ sd[f"{name}{dot}weight"].T + sd[f"{name}{dot}bias"]

    for block in (f"{prefix}transformer.resblocks.{i}." for i in range(2)):
        qkv = linear(block + "attn.in_proj", norm(block + "ln_1", x), "_")
        heads = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, L, d)
        q, k, v = heads
        share = (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1)
        x = x + linear(block + "attn.out_proj", (share @ v).transpose(1, 2).flatten(2))
        hidden = act(linear(block + "mlp.c_fc", norm(block + "ln_2", x)))
        x = x + linear(block + "mlp.c_proj", hidden)
    return x


def image_tower(sd, pixels, act):
    sd = {name: x.float() for name, x in sd.items()}
    patches = F.unfold(pixels, PATCH, stride=PATCH).mT @ sd["visual.conv1.weight"].flatten(1).T
    first = sd["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], dim=1) + sd["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], sd["visual.ln_pre.weight"], sd["visual.ln_pre.bias"])
    x = transformer(sd, "visual.", x, 0, act)[:, 0]
    x = F.layer_norm(x, x.shape[-1:], sd["visual.ln_post.weight"], sd["visual.ln_post.bias"])
    return x @ sd["visual.proj"]


def text_tower(sd, ids, act):
    sd = {name: x.float() for name, x in sd.items()}
    mask = torch.full((LENGTH, LENGTH), -math.inf).triu(1)
    x = sd["token_embedding.weight"][ids] + sd["positional_embedding"]
    x = transformer(sd, "", x, mask, act)[range(len(ids)), ids.argmax(-1)]
    x = F.layer_norm(x, x.shape[-1:], sd["ln_final.weight"], sd["ln_final.bias"])
    return x @ sd["text_projection"]


def cosines(sd, pixels, ids) -> torch.Tensor:
    image, text = image_tower(sd, pixels, gelu), text_tower(sd, ids, gelu)
    return (image * text).sum(-1) / (image.norm(dim=-1) * text.norm(dim=-1))


def close(got: list[float], expected: torch.Tensor):
    assert all(type(value) is float for value in got)
    assert expected.std() > 1e-2, "the case would tell nothing"
    torch.testing.assert_close(torch.tensor(got), expected, atol=2e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------------
# Laws of each scorer.


def test_clip_is_the_cosine_of_text_and_cropped_image(made):
    folder, weights, vocab = made
    expected = cosines(weights[H], cropped(pictures()), tokens_of(PROMPTS, vocab))
    close(scorers.load("clip", folder)(pictures(), PROMPTS), expected)


def test_pickscore_is_the_cosine_times_exp_of_its_own_logit_scale(made):
    folder, weights, vocab = made
    sd = weights["PickScore"]
    expected = sd["logit_scale"].exp() * cosines(sd, cropped(pictures()), tokens_of(PROMPTS, vocab))
    close(scorers.load("pickscore", folder)(pictures(), PROMPTS), expected)


@pytest.mark.parametrize(("name", "file"), [("hps", HPS), ("hps-v2.0", HPS_V20)])
def test_hps_is_the_cosine_of_text_and_padded_image_by_an_open_clip_file(made, name, file):
    folder, weights, vocab = made
    expected = cosines(weights[file], padded(pictures()), tokens_of(PROMPTS, vocab))
    close(scorers.load(name, folder)(pictures(), PROMPTS), expected)


def test_aesthetic_is_the_matrices_applied_to_the_unit_image_feature(made):
    folder, weights, _ = made
    x = image_tower(weights[L], cropped(pictures()), quick_gelu)
    x = x / x.norm(dim=-1, keepdim=True)
    for layer in (0, 2, 4, 6, 7):
        x = x @ weights[HEAD][f"layers.{layer}.weight"].T + weights[HEAD][f"layers.{layer}.bias"]
    score = scorers.load("aesthetic", folder)
    close(score(pictures(), PROMPTS), x[:, 0])
    assert score(pictures(), PROMPTS) == score(pictures(), [""] * 4)


@pytest.mark.parametrize("name", ["preference", "faithfulness"])
def test_toy_scorers_are_those_of_toy_py(name):
    captions = [toy.caption_of("red", "circle", "white"), toy.caption_of("blue", "cross", "black")]
    images = [toy.draw(captions[0], np.random.default_rng(0))] * 2
    judge = getattr(toy, name)
    expected = [judge(image, caption) for image, caption in zip(images, captions, strict=True)]
    assert scorers.load(name)(images, captions) == expected


@pytest.mark.parametrize("size", [(90, 51), (51, 90), (33, 32), (32, 20), (9, 16), (64, 64)])
def test_padding_keeps_the_whole_image_in_the_middle_of_black(size):
    image = noise(*size)
    pixels = scorers.pad([image], SIZE)
    torch.testing.assert_close(pixels, padded([image]), atol=1e-4, rtol=0)
    long, short = max(size), min(size)
    border = (pixels * STD + MEAN).abs().amax(dim=(0, 1)) < 1e-6  # exactly black in all channels
    black = border.all(dim=0).sum() + border.all(dim=1).sum()
    assert black == SIZE - round(short * SIZE / long)


@pytest.mark.parametrize("name", LEARNED)
def test_batch_equals_one_by_one(made, name):
    score = scorers.load(name, made[0])
    alone = [score([image], [text])[0] for image, text in zip(pictures(), PROMPTS, strict=True)]
    assert score(pictures(), PROMPTS) == pytest.approx(alone, abs=1e-5)
    assert score([], []) == []


@pytest.mark.parametrize("name", LEARNED)
def test_other_modes_score_as_their_rgb(made, name):
    score = scorers.load(name, made[0])
    modes = [noise(40, 30, "L"), noise(40, 30, "RGBA"), noise(40, 30, "P"), noise(40, 30, "1")]
    modes[1].putalpha(noise(40, 30, "L"))
    plain = [image.convert("RGB") for image in modes]
    assert score(modes, PROMPTS) == score(plain, PROMPTS)


def test_as_many_images_as_prompts(made):
    with pytest.raises(UserError, match="clip: 1 images, but 2 prompts"):
        scorers.load("clip", made[0])(pictures()[:1], PROMPTS[:2])


def test_every_scorer_has_a_title_in_the_order_of_tables():
    assert list(scorers.SCORERS) == ["preference", "faithfulness", *LEARNED]
    titles = "preference, faithfulness, Aesthetic, PickScore, HPS v2.1, HPS v2.0, CLIP"
    assert list(published.TITLES) == list(scorers.SCORERS)
    assert ", ".join(published.TITLES.values()) == titles
    assert published.PERCENT == {"faithfulness"}


# -------------------------------------------------------------------------------------------------
# Laws of the files.


def test_weights_may_be_a_pickle_of_tensors_in_half_precision(made, copy):
    weights = {name: x.half() for name, x in load_file(copy / H / "model.safetensors").items()}
    torch.save(weights, copy / H / "pytorch_model.bin")
    (copy / H / "model.safetensors").unlink()
    got = scorers.load("clip", copy)(pictures(), PROMPTS)
    half = {name: x.half() for name, x in made[1][H].items()}
    close(got, cosines(half, cropped(pictures()), tokens_of(PROMPTS, made[2])))


def test_a_head_stored_without_zip_is_read(made, copy):
    torch.save(made[1][HEAD], copy / HEAD, _use_new_zipfile_serialization=False)
    expected = scorers.load("aesthetic", made[0])(pictures(), PROMPTS)
    assert scorers.load("aesthetic", copy)(pictures(), PROMPTS) == expected


def test_constants_beside_the_weights_are_passed_over(made, copy):
    sd = made[1][HPS] | {"attn_mask": torch.zeros(LENGTH, LENGTH)}
    torch.save({"state_dict": sd}, copy / HPS)
    scorers.check("hps", PROMPTS, copy)
    expected = scorers.load("hps", made[0])(pictures(), PROMPTS)
    assert scorers.load("hps", copy)(pictures(), PROMPTS) == expected


def rewrite(path: Path, change):
    """Apply change to the tensors of a file."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    else:
        stored = torch.load(path, weights_only=True)
        change(stored.get("state_dict", stored))
        torch.save(stored, path)


TENSORS = [
    ("clip", f"{H}/model.safetensors", "vision_model.post_layernorm.bias"),
    ("pickscore", PICKSCORE, "text_model.encoder.layers.1.self_attn.k_proj.weight"),
    ("hps", HPS, "transformer.resblocks.1.attn.in_proj_bias"),
    ("hps-v2.0", HPS_V20, "visual.proj"),
    ("aesthetic", f"{L}/pytorch_model.bin", "logit_scale"),
    ("aesthetic", HEAD, "layers.4.weight"),
    ("aesthetic", HEAD, "layers.4.bias"),
]


@pytest.mark.parametrize(("name", "file", "tensor"), TENSORS)
def test_a_tensor_that_does_not_fit_is_refused_by_name(copy, name, file, tensor):
    scorers.check(name, PROMPTS, copy)
    whole, shape = (copy / file).read_bytes(), []

    def spoil(tensors):
        shape[:] = tensors[tensor].shape
        if how == "misshaped":
            tensors[tensor] = torch.zeros(5, 7, 3)
        elif how == "missing":
            del tensors[tensor]
        else:
            tensors[tensor + "_ema"] = torch.zeros(5, 7, 3)

    for how in ("missing", "unknown", "misshaped"):
        (copy / file).write_bytes(whole)
        rewrite(copy / file, spoil)
        for run in (scorers.check, lambda *args: scorers.load(name, copy)):
            with pytest.raises(UserError) as refused:
                run(name, PROMPTS, copy)
            text = str(refused.value)
            assert text.startswith(f"scorer {name}: ") and str(copy / file) in text
            assert "\n" not in text and text.endswith("; take the published file.")
            has = "no tensor" if how == "missing" else "shape (5, 7, 3)"
            if how == "unknown":
                assert f"has {has} for {tensor}_ema, the architecture no such tensor" in text
            elif tensor == "layers.4.bias":  # the width is read off it, so its weight complains
                assert "layers.4." in text
            else:
                assert f"has {has} for {tensor}, the architecture shape {tuple(shape)}" in text


def test_a_head_with_two_outputs_is_refused(copy):
    rewrite(copy / HEAD, lambda head: head.update({"layers.7.bias": torch.zeros(2)}))
    refusal = r"has shape \(2,\) for layers.7.bias, the architecture shape \(1,\)"
    with pytest.raises(UserError, match=refusal):
        scorers.check("aesthetic", PROMPTS, copy)


class Code:
    """Unpickled without care, it makes a folder."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


PICKLES = [("hps", HPS), ("aesthetic", HEAD), ("aesthetic", f"{L}/pytorch_model.bin")]


@pytest.mark.parametrize(("name", "file"), PICKLES)
def test_a_pickle_with_code_is_refused_and_not_run(copy, name, file):
    torch.save({"state_dict": {}, "extra": Code(copy / "owned")}, copy / file)
    with pytest.raises(UserError, match="more than plain tensors.*download it again"):
        scorers.check(name, PROMPTS, copy)
    assert not (copy / "owned").exists()


CLIP_FILES = ("model.safetensors", "config.json", "preprocessor_config.json", "vocab.json")
FILES = [("clip", f"{H}/{file}") for file in CLIP_FILES]
FILES += [("hps", HPS), ("hps", f"{H}/merges.txt"), ("aesthetic", HEAD)]


@pytest.mark.parametrize(("name", "file"), FILES)
@pytest.mark.parametrize("content", ["{", "version https://git-lfs.github.com/spec/v1\noid 1\n"])
def test_a_broken_file_is_named_in_one_sentence(copy, name, file, content):
    (copy / file).write_text(content)
    with pytest.raises(UserError) as refused:
        scorers.check(name, PROMPTS, copy)
    text, pair = str(refused.value), (f"{H}/vocab.json", f"{H}/merges.txt")  # are read together
    assert str((copy / file).parent if file in pair else copy / file) in text
    assert "\n" not in text


def test_a_vocabulary_with_another_end_token_is_refused(copy):
    vocab = json.loads((copy / H / "vocab.json").read_text())
    last, end = list(vocab)[-3], "<|endoftext|>"
    vocab[last], vocab[end] = vocab[end], vocab[last]
    (copy / H / "vocab.json").write_text(json.dumps(vocab))
    for name in ("clip", "pickscore", "hps"):
        with pytest.raises(UserError, match="vocab.json' ends a text with"):
            scorers.check(name, PROMPTS, copy)


def test_a_crop_of_another_size_is_refused(copy):
    path = copy / H / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"crop_size": 48}))
    with pytest.raises(UserError, match="crops to 48 x 48, but the model reads 32 x 32"):
        scorers.check("pickscore", PROMPTS, copy)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("name", LEARNED)
def test_an_unreachable_hub_gives_one_sentence(tmp_path, name, folder):
    with pytest.raises(UserError) as refused:
        scorers.check(name, PROMPTS, tmp_path if folder else None)
    text = str(refused.value)
    assert text.startswith(f"scorer {name}: Cannot load the scorer '")
    assert "': the hub cannot be reached; check the network, or put the file at " in text
    assert str(tmp_path if folder else "FOLDER") in text and text.endswith("/config.json.")


def test_what_the_folder_lacks_is_asked_of_the_hub_under_its_published_name(
    made, tmp_path, monkeypatch
):
    asked = []

    def download(repository, file, repo_type):
        asked.append(f"{repository}/{file}")
        if file == "model.safetensors" and repository == L:
            raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError, "404")
        return str(made[0] / repository / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    for name in LEARNED:
        scorers.check(name, PROMPTS, tmp_path)
    assert set(asked) == {
        *(f"{H}/{file}" for file in (*CLIP_FILES, "merges.txt")),
        *(f"{L}/{file}" for file in (*CLIP_FILES[:3], "pytorch_model.bin")),
        *("yuvalkirstain/PickScore_v1/config.json", PICKSCORE, HPS, HPS_V20, HEAD),
    }


def test_the_folder_comes_before_the_hub(made, monkeypatch):
    monkeypatch.setattr(hub, "hf_hub_download", None)
    for name in LEARNED:
        scorers.check(name, PROMPTS, made[0])


# -------------------------------------------------------------------------------------------------
# What a user can get wrong.


@pytest.mark.parametrize("name", ["preference", "faithfulness"])
def test_a_toy_scorer_refuses_prompts_that_are_no_toy_captions(name):
    scorers.check(name, toy.prompts())
    with pytest.raises(UserError) as refused:
        scorers.check(name, [*toy.prompts(), "a corgi"])
    assert str(refused.value).startswith(f"scorer {name}: 'a corgi' is not a toy caption")
    assert str(refused.value).endswith("have aesthetic, pickscore, hps, hps-v2.0, clip.")


def test_an_unknown_scorer_is_refused_with_the_known_ones():
    for run in (lambda: scorers.check("beauty", []), lambda: scorers.load("beauty")):
        with pytest.raises(UserError, match="unknown scorer 'beauty'; there are pref"):
            run()


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder '.*nowhere'"):
        scorers.check("clip", PROMPTS, tmp_path / "nowhere")
