"""Where xt and tau come from: the latent sources, and all that is random about them.

    inversion        DDIM inversion of each image, by the policy or by the reference, on a path of
                     invert.py
    renoise          the same on the uniform path, with two predictions a move (SmPO)
    released         inversion as the released script does it, to compare with
    noise            forward noise, one for each image; of a pairwise objective one for each pair

Randomness is a function of (seed, number of the pair n), and for the cell of t of (seed, micro-step
of the pair): a run resumes by index, and does not depend on the number of ranks as long as
--micro-batch x ranks stays the same.
"""

from argparse import Namespace
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from invert import add_noise, ddim_invert, ddim_step, implied_noise, randn_like
from training.methods import OBJECTIVES

STRATUM, TIME, NOISE = 101, 102, 103  # keep the random streams of one seed apart


def latents(args: Namespace, policy, frozen, x0, t, abar, noise) -> tuple[Tensor, Tensor]:
    """(xt, tau): the images at t and the noise that explains them, (B, C, h, w) fp32 each.

    policy, frozen: eps_fn(x, t) of invert.py. x0: (B, C, h, w) clean latents, winners first. t:
    (B,) int64. noise: a generator per image."""
    if args.latents != "noise":
        inverter = policy if args.inverter == "policy" else frozen
        path = args.inversion_steps, args.eta, noise
        if args.latents == "released":
            return released(inverter, x0, t, abar, *path)
        renoise = args.latents == "renoise"
        spacing = "uniform" if renoise else args.inversion_spacing
        return ddim_invert(inverter, x0, t, abar, *path, spacing, renoise)
    tau = randn_like(x0, noise)
    if OBJECTIVES[args.objective].pairwise:
        tau = tau.chunk(2)[0].repeat(2, 1, 1, 1)
    return add_noise(x0, tau, abar[t]), tau


@torch.no_grad()
def released(eps_fn, x0: Tensor, t: Tensor, abar: Tensor, steps: int, eta: float, noise):
    """(xt, tau) as the released script finds them (train.py at a9cfc4d, lines 993 to 1014), with
    its faults: it starts from abar[0], shows the model t = -99 there, and ends on the first of 1,
    101, ..., 901 that is not below t, or on 901. tau is solved for with t's own abar nonetheless.

    Arguments as of ddim_invert; but in fp32, and with a path for each image of the batch, where the
    script has fp16 and the path of the first. t of one cell: all images make the same calls, of
    which those behind an image's own end move nothing."""
    width, x = len(abar) // steps, x0
    cell_end = int(t.max()) // width * width + width - 1
    for left in range(1 - width, min(cell_end, len(abar) - width), width):
        a, b = abar[max(left, 0)].expand(len(t)), abar[left + width].expand(len(t))
        moved = ddim_step(x, eps_fn(x, torch.full_like(t, left)), a, b)
        deviation = ((1 - a) / (1 - b) * (1 - b / a)).sqrt()
        moved = moved + eta * deviation.to(x).reshape(-1, 1, 1, 1) * randn_like(x0, noise)
        x = moved.where((left < t).to(x.device).reshape(-1, 1, 1, 1), x)
    return x, implied_noise(x0, x, abar[t])


def count_cells(args: Namespace) -> int:
    """Cells of the timesteps, one for all pairs of a micro-step: those of the uniform grid, where
    the cell decides the number of UNet calls. Elsewhere --strata, or one: each pair's t is free."""
    if args.latents in ("renoise", "released") or args.inversion_spacing == "uniform":
        return args.inversion_steps
    return args.strata or 1


def inversion_calls(args: Namespace, cells: Iterable[int]) -> list[int]:
    """UNet calls to invert an image to a t of each of these cells."""
    calls = {
        "noise": lambda k: 0,
        "renoise": lambda k: 2 * (k + 1),
        "released": lambda k: min(k + 2, args.inversion_steps),
        "uniform": lambda k: k + 1,
        "log-sigma": lambda k: args.inversion_steps,
    }[args.inversion_spacing if args.latents == "inversion" else args.latents]
    return list(map(calls, cells))


def stratum(seed: int, micro_step: int, cells: int) -> int:
    """The cell of the timesteps that all pairs of a micro-step share, on every rank.

    Each cycle of `cells` micro-steps visits every cell once, in a random order."""
    cycle, place = divmod(micro_step, cells)
    return int(np.random.default_rng([seed, STRATUM, cycle]).permutation(cells)[place])


def draw_timesteps(seed: int, numbers, at_once: int, cells: int, timesteps: int) -> Tensor:
    """t, (P,) int64, of the pairs of these numbers (P,): uniform in the cell of their micro-step.

    at_once: pairs of a micro-step on all ranks; pair n is in micro-step n // at_once. The `cells`
    cells divide 0..timesteps-1 evenly, so that t is uniform over the run."""
    width, drawn = timesteps // cells, []
    for n in map(int, numbers):
        place = np.random.default_rng([seed, TIME, n]).integers(width)
        drawn.append(stratum(seed, n // at_once, cells) * width + place)
    return torch.tensor(drawn, dtype=torch.int64)


def generators(seed: int, numbers, stream: int = NOISE) -> list[torch.Generator]:
    """One per image, winners first; on the CPU, so that every device draws the same."""
    streams = [
        np.random.default_rng([seed, stream, side, int(n)]) for side in (0, 1) for n in numbers
    ]
    return [torch.Generator().manual_seed(int(stream.integers(2**63))) for stream in streams]
