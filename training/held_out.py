"""Pairs that are kept from training, and what policy and reference make of them.

    plan = split(args, plan)                   # --held-out SHARE, once the run's folder is locked
    unseen = HeldOut(args, plan, pipeline, engine, reference, objective)
    unseen.measure(pause)                      # {"loss": ..., "implicit_accuracy": ..., ...}

Nothing that is held out occurs in training. In Pick-a-Pic captions and pictures recur, so rows are
joined to groups: those of one caption (whatever its case and spaces; an empty one joins nothing),
or with a picture in common, directly or over other rows. A group is held out whole or not at all.
The groups are a function of the data, which of them are held out one of (data, seed); held_out.json
in the run's folder has the rows, so that a run compares its pairs once.

Two pictures are taken as one if their length and their first and last 4 KB are equal: a collision
could only join groups. Rank 0 reads every pair once for that, as an epoch of training does: all 335
GB of Pick-a-Pic, half an hour from a disk of 200 MB/s (computed).

What is measured is the training objective itself, without augmentation: the same source of latents
(an inversion by the policy, for InPO), the same errors and loss. Forward noise would be cheaper, 4
UNet calls a pair in place of 15, but its accuracy is another number than the training one, which it
is to be compared with. Instead there is a fixed number of places, each with a pair, a timestep and
noise of its own, the same at every step and on any number of ranks. Timesteps are stratified: an
equal part of 0..T-1 for each place, and an equal number of places for each cell of the inversion's
grid, so that all ranks take the same number of UNet calls, as ZeRO-3 needs. Pictures are cropped to
the square, under --buckets as well.
"""

import dataclasses
import hashlib
import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from statistics import fmean

import numpy as np
import torch
import torch.distributed as dist
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from tqdm import tqdm

import data
import model
from loss import squared_error
from model import Denoiser
from system.files import UserError, read_json, warn_once, write
from system.processes import on_main, print0
from training import cache
from training.latents import generators, inversion_calls, latents
from training.methods import OBJECTIVES, Errors, Objective

GROUPS, PLACES, POSTERIOR, NOISE = 104, 105, 106, 107  # keep the random streams of one seed apart
COUNT, EACH = 256, 4  # places at most, and for each pair where these are fewer
PART = 4096  # bytes
COMPARED = 20_000  # rows of --data, at most, that a second source is compared with

# -------------------------------------------------------------------------------------------------
# Which pairs.


def split(args: Namespace, plan):
    """The plan with the held-out share of its pairs apart from the others (collective).

    Raises UserError where the pairs hang together so much that no group is small enough."""
    if isinstance(args.held_out, str):
        on_main(lambda: warn_of_overlap(plan))
    if isinstance(args.held_out, str) or not args.held_out:
        return plan
    held = on_main(lambda: rows_held_out(args, plan))
    trained = np.setdiff1d(np.arange(len(plan.pairs)), held)
    name = hashlib.sha256(f"{plan.fingerprint} {held}".encode()).hexdigest()[:16]
    pairs, order = plan.pairs.select(trained), None
    if args.stream:
        order = data.streamed(pairs, args.stream, args.seed, plan.resolution)
    if args.buckets:
        order = data.bucketed(plan.pairs, plan.order.shapes, args.buckets, args.seed, trained)
    return dataclasses.replace(
        plan,
        pairs=pairs,
        held_out=plan.pairs.select(held),
        fingerprint=name,
        order=order,
    )


def rows_held_out(args: Namespace, plan) -> list[int]:
    """Ascending; from held_out.json where it is of these data, share and seed, else found anew."""
    file = args.out / "held_out.json"
    what = {"data": plan.fingerprint, "share": args.held_out, "seed": args.seed}
    if file.exists():
        try:
            found = read_json(file)
        except UserError:
            found = {}
        if {key: found.get(key) for key in what} == what:
            return found["rows"]
    rows = choose(groups(plan.pairs), args.held_out, args.seed)
    write(file, json.dumps(what | {"rows": rows}) + "\n")
    return rows


def groups(pairs) -> np.ndarray:
    """(N,) the number of the group of each row; a row that cannot be read is one of its own."""
    found = [(row, mark) for row, some in enumerate(marks(pairs)) for mark in some]
    rows = np.array([row for row, _ in found], dtype=np.int64)
    number = np.unique(np.array([mark for _, mark in found], dtype="S16"), return_inverse=True)[1]
    size = len(pairs) + len(found)
    edges = np.ones(len(found), dtype=bool), (rows, len(pairs) + number)
    return connected_components(coo_array(edges, shape=(size, size)), directed=False)[1][
        : len(pairs)
    ]


def marks(pairs) -> Iterator[list[bytes]]:
    """What each row may have in common with another: digests of its caption and two pictures."""
    for row in tqdm(range(len(pairs)), desc="comparing pairs", unit="", leave=False):
        try:
            pair = pairs[row]
        except Exception:  # as in data.Pairs: training leaves the row out
            yield []
            continue
        caption = " ".join((pair["caption"] or "").casefold().split())
        found = [b"caption " + caption.encode()] if caption else []
        for picture in filter(None, (pair[name] for name in data.PICTURES)):
            found.append(b"picture %d " % len(picture) + picture[:PART] + picture[-PART:])
        yield [hashlib.blake2b(mark, digest_size=16).digest() for mark in found]


def warn_of_overlap(plan):
    """Say how many held-out pairs of a second source have something in common with training; not
    of large data, which would have to be read."""
    if len(plan.pairs) <= COMPARED:
        seen = {mark for some in marks(plan.pairs) for mark in some}
        if shared := sum(bool(seen.intersection(some)) for some in marks(plan.held_out)):
            print0(
                f"Warning: {shared:,} of {len(plan.held_out):,} held-out pairs have a caption or a "
                "picture that is trained on, too; their accuracy is not that of unseen pairs.",
                file=sys.stderr,
            )


def choose(group: np.ndarray, share: float, seed: int) -> list[int]:
    """The rows, ascending, of whole groups in random order, as long as they are at most `share` of
    all; larger groups are passed over."""
    sizes, left = np.bincount(group), min(max(1, round(share * len(group))), len(group) - 1)
    taken = np.zeros(len(sizes), dtype=bool)
    for one in np.random.default_rng([seed, GROUPS]).permutation(len(sizes)):
        if sizes[one] <= left:
            taken[one], left = True, left - sizes[one]
    if not taken.any():
        raise UserError(
            f"--held-out {share:g}: of {len(group):,} pairs, the smallest group that has captions "
            f"or pictures in common has {sizes.min():,}, more than this share; give a larger one, "
            "or a second source of pairs."
        )
    return np.flatnonzero(taken[group]).tolist()


# -------------------------------------------------------------------------------------------------
# What becomes of them.


def layout(
    seed: int, rows: int, cells: int, timesteps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cell, row, t) of each place, (J,) each, by ascending cell; J is COUNT, or EACH for a row if
    that is less, or a little more. Rows come in a random order, again and again."""
    each, width = math.ceil(min(COUNT, EACH * rows) / cells), timesteps // cells
    rng = np.random.default_rng([seed, PLACES])
    order = rng.permutation(rows)
    cell, within = np.divmod(np.arange(cells * each), each)
    t = cell * width + (within + rng.random(len(cell))) * width // each
    return cell, order[np.arange(len(cell)) % rows], t.astype(np.int64)


def count(args: Namespace, plan) -> int:
    """Pairs that are held out; before `split`, about as many."""
    if plan.held_out is not None:
        return len(plan.held_out)
    return args.held_out and max(1, round(args.held_out * len(plan.pairs)))


def calls(args: Namespace, plan) -> int:
    """UNet calls of a measurement, over all ranks."""
    places = len(layout(args.seed, count(args, plan), plan.strata, plan.timesteps)[0])
    inverting = fmean(inversion_calls(args, range(plan.strata)))
    scored = 2 if OBJECTIVES[args.objective].reference else 1
    return round(places * plan.images_per_pair * (inverting + scored))


@dataclasses.dataclass
class Batch:
    """A micro-batch of this rank, on the CPU."""

    places: np.ndarray  # (P,)
    counts: np.ndarray  # (P,) bool: not where it only fills the batch up, or its pair is broken
    t: Tensor  # (images * P,)
    x0: Tensor  # (images * P, C, h, w)
    cond: dict  # of images * P


class HeldOut:
    """The held-out pairs of a run. objective: training's."""

    def __init__(self, args: Namespace, plan, pipeline, engine, reference, objective: Objective):
        self.args, self.plan, self.pipeline = args, plan, pipeline
        self.engine, self.reference, self.objective = engine, reference, objective
        self.abar = model.alphas_cumprod(pipeline)
        self.cell, self.row, self.t = layout(
            args.seed, len(plan.held_out), plan.strata, plan.timesteps
        )
        self.batches: list[Batch] = []  # once they have been encoded

    @torch.no_grad()
    def measure(self, pause: Callable[[], None]) -> dict[str, float]:
        """Means over the places: the loss, that of a policy like the reference as `start` (None for
        SFT), accuracy and margin where the method has them (collective).

        pause() is called by all ranks before each micro-batch; what it raises ends it."""
        images, device = self.plan.images_per_pair, self.engine.device
        if not self.batches:
            with cache.encoders_on(self.pipeline, device):
                self.batches = list(self.encode(pause))
        errors = torch.zeros(3, images, len(self.t), device=device)  # policy's, reference's, count
        for batch in self.batches:
            pause()
            err, err_ref = self.score(batch)
            for i, values in enumerate((err, err_ref, torch.ones_like(err))):
                if values is not None:
                    found = values.view(images, -1)[:, batch.counts]
                    errors[i, :, batch.places[batch.counts]] = found
        dist.all_reduce(errors)
        err, err_ref, count = errors[:, :, errors[2, 0] > 0].flatten(1)
        if not len(count):
            warn_once("all held-out pairs are broken; nothing is logged of them.")
            return {"loss": math.nan, "start": None}
        err_ref = None if self.reference is None else err_ref
        losses, found = self.objective.loss(self.args, Errors(err, err_ref))
        values = {"loss": losses.mean().item(), "start": None}
        if err_ref is not None:
            start = self.objective.loss(self.args, Errors(err_ref, err_ref))[0]
            values["start"] = start.mean().item()
        shown = {k: found[k].item() for k in ("implicit_accuracy", "margin") if k in found}
        return values | shown

    def score(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(err, err_ref), as Steps 2 and 3 of the training loop have them, of images * P."""
        device, t = self.engine.device, batch.t
        cond, predicts = to(batch.cond, device), self.pipeline.scheduler.config.prediction_type
        policy = Denoiser(self.engine, cond, self.abar, predicts)
        frozen = Denoiser(self.reference, cond, self.abar, predicts)
        noise = generators(self.args.seed, batch.places, NOISE)[: len(t)]
        x0 = batch.x0.to(device)
        xt, tau = latents(self.args, policy, frozen, x0, t, self.abar, noise)
        err = squared_error(policy(xt, t), tau)
        return err, None if self.reference is None else squared_error(frozen(xt, t), tau)

    def encode(self, pause: Callable[[], None]) -> Iterator[Batch]:
        """This rank's batches; all ranks have as many."""
        size, images = self.plan.resolution, self.plan.images_per_pair
        for places, counts in self.shares():
            pause()
            pixels = torch.zeros(2, len(places), 3, size, size, dtype=torch.uint8)
            captions, sizes = [""] * len(places), [[size, size, 0, 0, size, size]] * 2 * len(places)
            for i in np.flatnonzero(counts):
                try:
                    pair = self.plan.held_out[int(self.row[places[i]])]
                    pixels[0, i], pixels[1, i], captions[i], before = data.read_pair(pair, size)
                except Exception:  # as in data.Pairs: the pair is left out
                    counts[i] = False
                    continue
                for side, image in enumerate(before if self.args.true_sizes else ()):
                    told = data.told(image, (size, size), None, False)
                    sizes[side * len(places) + i] = told
            noise = generators(self.args.seed, places, POSTERIOR)[: images * len(places)]
            x0 = model.encode_images(self.pipeline, pixels[:images].flatten(0, 1), noise)
            cond = model.repeat(model.encode_prompts(self.pipeline, captions, size), images)
            cond = model.tell_sizes(cond, sizes[: images * len(places)])
            t = torch.from_numpy(self.t[places]).repeat(images)
            yield Batch(places, counts, t, x0.cpu(), to(cond, "cpu"))

    def shares(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(places, whether they count) of this rank's micro-batches, (P,) each, in one cell on all
        ranks; the last ones of a cell are filled up."""
        micro, rank = self.args.micro_batch, dist.get_rank()
        at_once = dist.get_world_size() * micro
        for cell in range(self.plan.strata):
            places = np.flatnonzero(self.cell == cell)
            for start in range(0, len(places), at_once):
                mine = start + rank * micro + np.arange(micro)
                counts = mine < len(places)
                yield places[np.where(counts, mine, 0)], counts


def to(cond: dict, device) -> dict:
    """cond on a device."""
    return {
        key: to(value, device) if isinstance(value, dict) else value.to(device)
        for key, value in cond.items()
    }
