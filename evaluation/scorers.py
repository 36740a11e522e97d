"""Scorers: a number for an image and its prompt, higher is better.

    score = scorers.load("hps", device="cuda")
    score(images, prompts)        # a list of floats, one per image

preference and faithfulness are those of toy.py; aesthetic, pickscore, hps (v2.1), hps-v2.0 and clip
are published networks. Their files come from the Hugging Face hub, or from FOLDER/owner/name/file
where a folder of copies is given. Only safetensors and pickles of plain tensors are opened, so that
no file can run code. FILE.py:FUNCTION is a function of the user's own, see own.py.

Where this departs from the published scorers, and why:

1. Everything is in fp32, and half-precision files are cast up. HPSv2 scores under autocast, and the
   aesthetic predictor has its CLIP in fp16 on a GPU, where close images can tie or change places.
2. HPSv2 resizes by torchvision's default for tensors: antialiased since torchvision 0.17, not
   before. Here it is not, as in the torchvision 0.15 that fits the torch 2.0.1 pinned by InPO.
3. HPSv2 repairs prompts with ftfy, which straightens curly quotes (12 of the 1,632 Parti-Prompts
   have some), and unescapes HTML. Here prompts stay as they are, the same for all models.
4. HPSv2 pads only what it resizes, and so fails on oblong images whose long side is 224. Here every
   oblong image is padded."""

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from zipfile import is_zipfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import toy
from evaluation import own
from evaluation.published import TOY
from system.files import UserError
from system.hub import download, reason
from system.processes import is_main

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L = "openai/clip-vit-large-patch14"
PICKSCORE = "yuvalkirstain/PickScore_v1"
HPS = "xswu/HPSv2"
# Others have put it on the hub. The original, in christophschuhmann/improved-aesthetic-predictor on
# GitHub, has SHA-256 21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0.
AESTHETIC = "camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth"


# -------------------------------------------------------------------------------------------------
# Files: found in the folder or on the hub, and opened without running what they hold.


def locate(folder: Path | None, repository: str, *files: str) -> Path:
    """The first of files that FOLDER/repository holds, else the first that the hub has."""
    for file in files:
        if folder and (place := Path(folder, repository, file)).is_file():
            return place
    place = Path(folder or "FOLDER", repository, files[0])
    return download(repository, "scorer", *files, instead=f"put the file at {place}")[0]


def opened(reader: Callable, path: Path):
    """reader(path); an error of a library becomes one sentence."""
    try:
        return reader(path)
    except Exception as error:
        said = reason(error)
        if isinstance(error, pickle.UnpicklingError):
            said = "it is broken or holds more than plain tensors, and a pickle can run code"
        raise UserError(f"'{path}' is not opened: {said}; download it again.") from error


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU, mapped from disk: shapes are known unread."""
    if path.suffix == ".safetensors":
        return load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    found = found.get("state_dict", found)
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


# -------------------------------------------------------------------------------------------------
# Tensors: the file must have exactly those of the architecture, in its shapes.

BUFFERS = ("position_ids", "attn_mask")  # constants that some files hold besides the weights
TRANSPOSED = {"visual.proj", "text_projection"}  # open_clip multiplies by them from the right
OPEN_CLIP = {  # transformers' name of a tensor -> open_clip's: replace all of these, in this order
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "vision_model.": "visual.",
    "text_model.": "",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.": "",
    "encoder.layers": "transformer.resblocks",
    "self_attn.q_proj.": "attn.in_proj_",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "layer_norm": "ln_",
}


def open_clip_names(names: list[str]) -> dict[str, list[str]]:
    """{open_clip's name: transformers' names}. Three names where query, key and value are one
    tensor, stacked in this order along dim 0."""
    table = {}
    for name in names:
        if ".k_proj." not in name and ".v_proj." not in name:
            parts = [name.replace(".q_proj.", f".{x}_proj.") for x in "qkv"]
            for ours, theirs in OPEN_CLIP.items():
                name = name.replace(ours, theirs)
            table[name] = list(dict.fromkeys(parts))
    return table


def match(found: dict[str, Tensor], shapes: dict[str, tuple], path: Path):
    """Raises UserError with the name of the first tensor that is missing, unknown or misshaped.

    found: tensors of the file at path; shapes: {name: shape} that the architecture asks for."""
    found = {name: tuple(x.shape) for name, x in found.items() if not name.endswith(BUFFERS)}
    for name in [*shapes, *found]:
        if found.get(name) != shapes.get(name):
            has = f"shape {found[name]}" if name in found else "no tensor"
            asked = f"shape {shapes[name]}" if name in shapes else "no such tensor"
            raise UserError(
                f"'{path}' has {has} for {name}, the architecture {asked}; take the published file."
            )


def load_clip(
    folder: Path | None, device, architecture: str, repository: str = "", file: str = ""
) -> CLIPModel:
    """A CLIPModel in fp32 and eval mode, built from config.json of the repository `architecture`.

    Its weights are those of the same repository, or an open_clip file of another. On the device
    "meta" names and shapes are compared and no weight is read. (from_pretrained would only warn of
    what a file lacks, and draw it at random.)"""
    config = opened(CLIPConfig.from_pretrained, locate(folder, architecture, "config.json"))
    with torch.device("meta"):
        model = CLIPModel(config)
    empty = model.state_dict()
    names = open_clip_names(list(empty)) if file else {name: [name] for name in empty}
    files = [file] if file else ["model.safetensors", "pytorch_model.bin"]
    path = locate(folder, repository or architecture, *files)
    found, shapes, weights = opened(read, path), {}, {}
    for name, parts in names.items():
        whole = torch.cat([empty[part] for part in parts]) if len(parts) > 1 else empty[parts[0]]
        shapes[name] = tuple(whole.T.shape if name in TRANSPOSED else whole.shape)
    match(found, shapes, path)
    for name, parts in names.items():
        whole = found[name].T if name in TRANSPOSED else found[name]
        pieces = whole.chunk(len(parts)) if len(parts) > 1 else [whole]
        for part, piece in zip(parts, pieces, strict=True):
            weights[part] = piece.to(device, torch.float32)
    model.load_state_dict(weights, assign=True)
    for part in (model.text_model.embeddings, model.vision_model.embeddings):  # in no file
        part.position_ids = torch.arange(part.position_ids.shape[1], device=device)[None]
    return model.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------
# Preprocessing: RGB images to pixels (B, 3, S, S), S = 224 as published; prompts to tokens.


def load_crop(folder: Path | None, repository: str, model: CLIPModel) -> Callable:
    """CLIP's own, as preprocessor_config.json has it: the short side is resized to S by PIL
    (bicubic, antialiased, rounded to bytes), the centre cropped, and channels normalised."""
    path = locate(folder, repository, "preprocessor_config.json")
    processor = opened(CLIPImageProcessorPil.from_json_file, path)
    size, crop = model.config.vision_config.image_size, processor.crop_size
    if (crop.height, crop.width) != (size, size):
        has = f"'{path}' crops to {crop.height} x {crop.width}"
        raise UserError(f"{has}, but the model reads {size} x {size}; take the published file.")
    return lambda images: processor(images, return_tensors="pt")["pixel_values"]


def pad(images: list[Image.Image], size: int) -> Tensor:
    """HPSv2's: the long side is resized to `size`, bicubic, on floats that may overshoot 0..1; then
    zeros, which are black, fill both ends of the short side, the odd one below or to the right;
    then channels are normalised. Nothing is cropped; a square image gets no border."""
    batch = []
    for image in images:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        scale = size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        left, top = (size - width) // 2, (size - height) // 2
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=False)
        batch.append(F.pad(pixels, (left, size - width - left, top, size - height - top)))
    mean, std = (torch.tensor(x)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (torch.cat(batch) - mean) / std


def load_tokenizer(folder: Path | None, repository: str, model: CLIPModel) -> Callable:
    """prompts -> token ids (B, L) and mask; longer prompts are cut to 77 tokens as published.

    What fills up a row does not matter (zeros in open_clip, end tokens here): text attends
    backwards only, and its feature is read off at the first end token."""
    vocab, merges = (locate(folder, repository, file) for file in ("vocab.json", "merges.txt"))
    tokenizer = opened(lambda path: CLIPTokenizer(str(path), str(merges)), vocab)
    text = model.config.text_config
    # CLIPModel takes the end token 2, which old configurations name, to mean the highest id.
    end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    if tokenizer.eos_token_id != end:
        has = f"'{vocab}' ends a text with {tokenizer.eos_token_id}"
        raise UserError(f"{has}, but the model looks for {end}; take the published files.")
    length = text.max_position_embeddings
    return lambda prompts: tokenizer(
        prompts, padding=True, truncation=True, max_length=length, return_tensors="pt"
    )


# -------------------------------------------------------------------------------------------------
# Scorers. Each takes (folder, device) and returns a function: B RGB images, B prompts -> (B,).


def image_features(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Projected features of unit length, (B, D)."""
    features = model.get_image_features(pixel_values=pixels.to(model.device)).pooler_output
    return F.normalize(features, dim=-1)


def cosine(model: CLIPModel, pixels: Tensor, tokens) -> Tensor:
    """cos(text, image) of each pair, (B,), in -1..1."""
    text = model.get_text_features(**tokens.to(model.device)).pooler_output
    return (F.normalize(text, dim=-1) * image_features(model, pixels)).sum(-1)


def clip(folder: Path | None, device) -> Callable:
    """CLIP similarity, cos(text, image) (2103.00020), by a ViT-H/14 trained on LAION-2B.

    In -1..1. Papers that use ViT-L, or multiply by 100, print other numbers."""
    model = load_clip(folder, device, CLIP_H)
    crop, tokens = load_crop(folder, CLIP_H, model), load_tokenizer(folder, CLIP_H, model)
    return lambda images, prompts: cosine(model, crop(images), tokens(prompts))


def pickscore(folder: Path | None, device) -> Callable:
    """PickScore, exp(logit_scale) * cos(text, image) (2305.01569), by a ViT-H/14 tuned on choices
    between two images. It reads images and prompts as `clip` does.

    In -s..s, s = exp(logit_scale): at a difference of one the model expects odds of e : 1."""
    model = load_clip(folder, device, PICKSCORE)
    crop, tokens = load_crop(folder, CLIP_H, model), load_tokenizer(folder, CLIP_H, model)
    scale = model.logit_scale.exp()
    return lambda images, prompts: scale * cosine(model, crop(images), tokens(prompts))


def hps(folder: Path | None, device, file: str = "HPS_v2.1_compressed.pt") -> Callable:
    """HPS, cos(text, image) (2306.09341), by a ViT-H/14 tuned on human rankings.

    In -1..1; v2.0 and v2.1 cannot be compared. It sees the whole image, resized and padded, where
    `clip` and `pickscore` crop. The file is in open_clip's layout; of CLIP_H it needs configuration
    and vocabulary, not the weights."""
    model = load_clip(folder, device, CLIP_H, HPS, file)
    tokens, size = load_tokenizer(folder, CLIP_H, model), model.config.vision_config.image_size
    return lambda images, prompts: cosine(model, pad(images, size), tokens(prompts))


def aesthetic(folder: Path | None, device) -> Callable:
    """LAION's aesthetic score, about 1 to 10: x = f, then x = W x + b for each of five layers.

    f: image feature of CLIP ViT-L/14, of unit length. Widths are 768-1024-128-64-16-1 as published;
    between layers there was dropout in training and no activation, so the score is affine in f (all
    weights 0: the last bias). The prompt plays no part."""
    model = load_clip(folder, device, CLIP_L)
    crop, path = load_crop(folder, CLIP_L, model), locate(folder, *AESTHETIC)
    found, shapes, width = opened(read, path), {}, model.config.projection_dim
    for layer in (0, 2, 4, 6, 7):  # what is left out are dropouts; none lies between 6 and 7
        rows = found.get(f"layers.{layer}.bias", torch.empty(1)).numel() if layer < 7 else 1
        shapes |= {f"layers.{layer}.weight": (rows, width), f"layers.{layer}.bias": (rows,)}
        width = rows
    match(found, shapes, path)
    weights = [found[name].to(device, torch.float32) for name in shapes]

    def score(images, prompts):
        x = image_features(model, crop(images))
        for weight, bias in zip(weights[::2], weights[1::2], strict=True):
            x = F.linear(x, weight, bias)
        return x[:, 0]

    return score


def exact(judge: Callable, folder: Path | None, device) -> Callable:
    """judge(image, caption) of toy.py, for each pair; nothing is loaded."""
    return lambda images, prompts: torch.tensor(
        [judge(*pair) for pair in zip(images, prompts, strict=True)], dtype=torch.float64
    )


# -------------------------------------------------------------------------------------------------
# What evaluate.py calls: check before any image is drawn, load afterwards.

SCORERS = {
    "preference": functools.partial(exact, toy.preference),
    "faithfulness": functools.partial(exact, toy.faithfulness),
    "aesthetic": aesthetic,
    "pickscore": pickscore,
    "hps": hps,
    "hps-v2.0": functools.partial(hps, file="HPS_v2_compressed.pt"),
    "clip": clip,
}


def load(name: str, folder: Path | None = None, device="cpu") -> Callable:
    """The scorer: a function of B images, of any size and mode, and B prompts, giving B floats.

    folder: holds copies of hub repositories as owner/name; what is not there comes from the hub.
    Transparency is dropped, not blended. An image scores the same alone and in a batch, up to
    rounding. Raises UserError."""
    if name not in SCORERS and not own.is_own(name):
        raise UserError(f"unknown scorer '{name}'; there are {', '.join(SCORERS)}.")
    try:
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"there is no folder '{folder}'; name one that holds owner/name.")
        judge = None if own.is_own(name) else SCORERS[name](folder, device)
    except UserError as error:
        raise UserError(f"scorer {name}: {error}") from error
    judge = judge or own.load(name)

    @torch.no_grad()
    @torch.backends.cudnn.flags(
        enabled=True, allow_tf32=False
    )  # fp32 also where patches are embedded
    def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
        if len(images) != len(prompts):
            raise UserError(f"scorer {name}: {len(images)} images, but {len(prompts)} prompts.")
        scores = judge([image.convert("RGB") for image in images], prompts) if images else []
        return scores if isinstance(scores, list) else scores.tolist()

    return score


def check(name: str, prompts: list[str], folder: Path | None = None) -> None:
    """Raises UserError for what would stop `load(name, folder)` or its scorer on these prompts.

    It downloads what is missing, and compares names and shapes without reading a weight. A user's
    own function, which may load what it likes, is called on rank 0 for two pictures."""
    if own.is_own(name):
        if is_main():
            texts = toy.prompts()[:2]
            drawn = [toy.draw(text, np.random.default_rng(0)) for text in texts]
            score = load(name, folder)
            score([picture.resize((512, 512)) for picture in drawn], (prompts + texts)[:2])
        return
    load(name, folder, "meta")
    for prompt in prompts if name in TOY else []:
        try:
            toy.parse_caption(prompt)
        except ValueError as error:
            others = ", ".join(other for other in SCORERS if other not in TOY)
            raise UserError(
                f"scorer {name}: {str(error).removesuffix('.')}; other prompts have {others}."
            ) from error
