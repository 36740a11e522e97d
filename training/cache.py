"""What VAE and text encoders are asked for: at each step, or with --cache-latents once.

In the run's folder it keeps

    latents/KEY/pairs_00000.safetensors    16 rows: the VAE's posterior of winner and loser, with
                                           --flip of their mirror images, too
    latents/KEY/text_00000.safetensors     16 distinct captions, "" among them: the UNet's cond

A loop takes either `Live` or `Cached`, and gets the same values: the cache holds what the encoders
return, in their own dtype, and each pair draws from the posterior with its own noise. Encoders see
other batches when they fill it, so the last digits may differ (1e-5 of a latent in fp32); from 256
px on, where the VAE takes one image at a time, latents are bitwise the same.

KEY is made of all that decides the values: rows, model, resolution, flip, code. A folder of another
key is deleted. A file is written beside and renamed, so one that is there is whole, and a run that
was killed fills in what it lacks. Each rank writes its share of the files; all read all of them.
"""

import contextlib
import hashlib
import json
import math
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

import data
import model
from sources.pictures import what_is_broken
from system.files import UserError, replacing
from system.lock import delete_unfinished
from system.processes import code_version, is_main, on_main, together
from weights.modules import second_encoder

FILE = 16  # rows, or captions, of a file: few seconds of work, after which a signal is answered


class Live:
    """The encoders themselves. pairs: a data.Pairs."""

    def __init__(self, pairs: data.Pairs, pipeline):
        self.pairs, self.pipeline = pairs, pipeline

    def images(self, pictures: Tensor, noise: list[torch.Generator]) -> Tensor:
        """x0 (B, C, h, w) fp32 of pictures (B, 3, H, W) as the pairs have them."""
        return model.encode_images(self.pipeline, pictures, noise)

    def prompts(self, captions: list[str]) -> dict:
        """cond of P captions, of squares; `model.tell_sizes` puts other sizes in their place."""
        return model.encode_prompts(self.pipeline, captions, self.pairs.resolution)


class CachedPairs(data.Pairs):
    """Pairs whose pictures are posteriors (2C, h, w), read from the files of a cache."""

    def __init__(self, pairs: data.Pairs, folder: Path, captions: dict, broken: dict):
        self.__dict__ |= pairs.__dict__
        self.folder, self.caption_of, self.broken = folder, captions, broken

    def read(self, row: int, shape, crop_at: None, flip: bool) -> tuple[Tensor, Tensor, str, None]:
        if row in self.broken:
            raise ValueError(self.broken[row])
        with safe_open(file_of(self.folder, "pairs", row), "pt") as file:
            images = file.get_slice(str(row))[int(flip)]
        return images[0], images[-1], self.caption_of[row], None  # SFT has no loser, reads none


class Cached:
    """The same from files, without the encoders."""

    def __init__(self, pairs: data.Pairs, pipeline, folder: Path, device: torch.device):
        self.folder, self.vae, self.device = folder, pipeline.vae, device
        self.pairs = CachedPairs(pairs, folder, *read_rows(folder, len(pairs)))
        self.number = {caption: i for i, caption in enumerate(distinct(self.pairs.caption_of))}

    def images(self, posteriors: Tensor, noise: list[torch.Generator]) -> Tensor:
        return model.draw_latents(self.vae, posteriors.to(self.device), noise)

    def prompts(self, captions: list[str]) -> dict:
        rows = []
        for number in map(self.number.get, captions):
            with safe_open(file_of(self.folder, "text", number), "pt") as file:
                names = [key for key in file.keys() if key.startswith(f"{number}.")]
                rows.append({key.split(".", 1)[1]: file.get_tensor(key) for key in names})
        cond = {}
        for name in rows[0]:  # as added_cond_kwargs.text_embeds
            *group, leaf = name.split(".")
            into = cond.setdefault(group[0], {}) if group else cond
            into[leaf] = torch.stack([row[name] for row in rows]).to(self.device)
        return cond


def open_encoder(args: Namespace, plan, pipeline, run, engine, step: int) -> Live | Cached:
    """What the loop asks for x0 and cond, and its pairs; before a step (collective).

    With --cache-latents the encoders leave the device once all files are there."""
    pairs = data.Pairs(
        plan.pairs, plan.resolution, args.seed, args.crop, args.flip, args.caption_dropout,
        plan.order, args.true_sizes,
    )  # fmt: skip
    if not args.cache_latents:
        return Live(pairs, pipeline)
    clock, folder = time.monotonic(), args.out / "latents" / key(args, plan, run.record)
    on_main(lambda: make_room_for(folder))
    pause = lambda: run.stop_if_asked(engine, step)  # noqa: E731
    fill(folder, pairs, pipeline, plan.images_per_pair, pause)
    for encoder in encoders(pipeline):
        encoder.to("cpu")
    run.clock += time.monotonic() - clock  # this is not training
    return Cached(pairs, pipeline, folder, engine.device)


def encoders(pipeline) -> list[torch.nn.Module]:
    parts = pipeline.vae, pipeline.text_encoder, second_encoder(pipeline)
    return [part for part in parts if part is not None]


@contextlib.contextmanager
def encoders_on(pipeline, device: torch.device) -> Iterator[None]:
    """VAE and text encoders on this device, as drawing needs them, and then where they were."""
    places = [(encoder, encoder.device) for encoder in encoders(pipeline)]
    for encoder, _ in places:
        encoder.to(device)
    try:
        yield
    finally:
        for encoder, place in places:
            encoder.to(place)


# -------------------------------------------------------------------------------------------------
# Its files.


def key(args: Namespace, plan, record: dict) -> str:
    """16 hex digits of all that decides what the files hold. record: of the run."""
    what = {
        "rows": plan.fingerprint, "model": record["start_identity"], "flip": args.flip,
        "resolution": plan.resolution, "images": plan.images_per_pair, "code": code_version(),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def size(args: Namespace, plan, vae: torch.dtype) -> int:
    """Bytes of the files at most, where all captions differ. vae: the VAE's dtype."""
    unet, rows = plan.unet_config, len(plan.pairs)
    posterior = 2 * plan.vae_config.get("latent_channels", 4) * plan.latent**2 * vae.itemsize
    pooled = unet.get("projection_class_embeddings_input_dim") or 0
    text = (plan.tokens * unet["cross_attention_dim"] + pooled) * plan.dtype.itemsize
    return rows * plan.images_per_pair * (2 if args.flip else 1) * posterior + (rows + 1) * text


def make_room_for(folder: Path):
    """Delete what is in other folders, and what a kill has left in this one; rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)
    delete_unfinished(folder)


def file_of(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}_{number // FILE:05d}.safetensors"


def fill(folder: Path, pairs: data.Pairs, pipeline, images: int, pause: Callable[[], None]):
    """Write the files that are not there (collective). images: of a pair, winner first. pause() is
    called by all ranks before each file."""

    def write_rows(rows: range) -> tuple[dict, dict]:
        pictures, captions, broken = {}, {}, {}
        for row in rows:
            try:
                *pair, captions[row], _ = data.read_pair(pairs.dataset[row], pairs.resolution)
                pictures[row] = torch.stack(pair[:images])
            except Exception as error:  # as in data.Pairs
                broken[row] = what_is_broken(error)
        if not pictures:
            return {}, {"captions": captions, "broken": broken}
        sides = torch.stack(list(pictures.values()))  # (rows, images, 3, R, R)
        sides = torch.stack([sides, sides.flip(-1)] if pairs.flip else [sides], 1)
        found = model.posteriors(pipeline, sides.flatten(0, 2)).cpu().unflatten(0, sides.shape[:3])
        tensors = dict(zip(map(str, pictures), found.unbind(), strict=True))
        return tensors, {"captions": captions, "broken": broken}

    def write_captions(numbers: range) -> tuple[dict, dict]:
        some = captions[numbers.start : numbers.stop]
        cond = model.encode_prompts(pipeline, some, pairs.resolution)
        named = {f"{group}.{k}": x for group, more in cond.items() if isinstance(more, dict)
                 for k, x in more.items()}  # fmt: skip
        named |= {name: x for name, x in cond.items() if isinstance(x, Tensor)}
        rows = {f"{n}.{name}": x[i] for i, n in enumerate(numbers) for name, x in named.items()}
        return {name: x.cpu() for name, x in rows.items()}, {}

    write_all(folder, "pairs", len(pairs), write_rows, pause)
    captions = distinct(read_rows(folder, len(pairs))[0])
    write_all(folder, "text", len(captions), write_captions, pause)


def write_all(folder: Path, kind: str, count: int, make: Callable, pause: Callable[[], None]):
    """Write the files of this kind that are not there, the n-th one on rank n mod world.

    make(numbers): (tensors by name, what else is to be known, as JSON)."""
    at_once = FILE * dist.get_world_size()
    bar = tqdm(total=count, desc=f"encoding {kind}", unit="", disable=not is_main())
    for start in range(0, count, at_once):
        pause()
        first = start + FILE * dist.get_rank()
        numbers, file = range(first, min(first + FILE, count)), file_of(folder, kind, first)

        def write(numbers=numbers, file=file):
            if not numbers or is_whole(file):
                return
            tensors, more = make(numbers)
            tensors = {
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in tensors.items()
            }
            content = safetensors.torch.save(tensors, {"more": json.dumps(more)})
            try:
                with replacing(file) as scratch:
                    scratch.write_bytes(content)
            except OSError as error:
                raise UserError(
                    f"--cache-latents: {error.filename} cannot be written ({error.strerror}); mend "
                    "that and repeat the command, which goes on there, or leave the flag out."
                ) from error

        together(write)
        bar.update(min(at_once, count - start))
    bar.close()


def is_whole(file: Path) -> bool:
    """Whether it is there, as long as it says."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def read_rows(folder: Path, count: int) -> tuple[dict[int, str], dict[int, str]]:
    """(caption of each row, reason of each row that is broken)."""
    captions, broken = {}, {}
    for i in range(math.ceil(count / FILE)):
        with safe_open(file_of(folder, "pairs", i * FILE), "pt") as file:
            more = json.loads(file.metadata()["more"])
        for into, found in ((captions, more["captions"]), (broken, more["broken"])):
            into |= {int(row): words for row, words in found.items()}
    return captions, broken


def distinct(captions: dict[int, str]) -> list[str]:
    """Of all rows, and the empty one, which a dropped caption becomes."""
    return sorted({"", *captions.values()})
