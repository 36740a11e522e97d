"""Inversion paths, and what is measured of them: their error, their gradient, their noise.

A path is compared with a fine one, many moves of the two-step rule. Nowhere is there guidance, nor
injected noise (eta 0), but in `added_variance`, which is about that noise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import invert
import model
from invert import ddim_invert, ddim_step, implied_noise
from loss import inpo_loss, squared_error
from model import Denoiser
from training.latents import draw_timesteps, generators, released

SEED = 7
FINE, FINE_GRADIENT = 120, 60  # UNet calls of a fine path
EULER_MOVES = 900  # of the path that the fine one is checked by
TIMESTEPS = 49, 149, 349, 549, 749, 949  # whose errors are shown; their mean stands for all t

# -------------------------------------------------------------------------------------------------
# Paths.

PAPER, RELEASED = "uniform cells, Euler (the paper's: 10)", "the released script's"
EULER, OURS = "log sigma, Euler", "log sigma, two-step (ours)"


@dataclass(frozen=True)
class Inversion:
    """A path of a kind (PAPER, RELEASED, EULER or OURS), with so many cells or moves."""

    kind: str
    steps: int

    @torch.no_grad()
    def __call__(self, eps_fn, x0: Tensor, t: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
        """(xt, tau) of clean latents, as ddim_invert."""
        if self.kind == EULER:
            return euler(eps_fn, x0, t, abar, self.steps)
        if self.kind == RELEASED:
            return released(eps_fn, x0, t, abar, self.steps, 0, None)
        return ddim_invert(eps_fn, x0, t, abar, self.steps, 0, None, spacing_of(self))

    def calls(self, timesteps: int = 1000) -> float:
        """UNet calls to invert an image, mean over all t."""
        if self.kind == PAPER:
            return (self.steps + 1) / 2
        if self.kind == RELEASED:  # from each of -99, 1, 101, ..., 801 that is below t
            width = timesteps // self.steps
            left = np.arange(1 - width, timesteps - width, width)
            return (left[:, None] < np.arange(timesteps)).sum(0).mean()
        return self.steps


def euler(eps_fn, x0: Tensor, t: Tensor, abar: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(xt, tau) by Euler's rule on the points of the log-sigma path."""
    x, t_from, abar_from = x0, torch.zeros_like(t), torch.ones_like(abar[t])
    for t_to in invert.path(t, steps, abar, "log-sigma"):
        x = ddim_step(x, eps_fn(x, t_from), abar_from, abar[t_to])
        t_from, abar_from = t_to, abar[t_to]
    return x, implied_noise(x0, x, abar[t])


@contextmanager
def points(choose: Callable[[Tensor, int, Tensor], list[Tensor]]) -> Iterator[None]:
    """ddim_invert's moves end on choose(t, steps, abar), whatever the spacing."""
    with mock.patch.object(invert, "path", lambda t, steps, abar, _: choose(t, steps, abar)):
        yield


def starting_at(first: int, t: Tensor, steps: int, abar: Tensor) -> list[Tensor]:
    """The log-sigma path, but its first move ends on min(first, t); first = 1 is ours."""
    sigma = ((1 - abar) / abar).sqrt()
    low, high = sigma[t.clamp(max=first)], sigma[t]
    wanted = [low * (high / low) ** share for share in torch.linspace(0, 1, steps).tolist()]
    return [*((sigma[:, None] - level).abs().argmin(0) for level in wanted[:-1]), t]


# -------------------------------------------------------------------------------------------------
# What is inverted.


@dataclass(frozen=True)
class Images:
    """Latents of pairs, winners first, with their conditioning."""

    x0: Tensor  # (2P, C, h, w)
    cond: dict
    abar: Tensor
    predicts: str

    @classmethod
    def read(cls, pipeline, source: str, pairs: int, dropout: float = 0):
        """The first pairs of a source in a random order, prepared as in training."""
        size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        rows = data.Pairs(data.read_pairs(source), size, SEED, caption_dropout=dropout)
        batch = data.collate([rows[n] for n in range(pairs)])
        x0 = model.encode_images(pipeline, batch["pixels"], generators(SEED, range(pairs)))
        cond = model.repeat(model.encode_prompts(pipeline, batch["captions"], size))
        abar = model.alphas_cumprod(pipeline).to(x0.device)
        return cls(x0, cond, abar, pipeline.scheduler.config.prediction_type)

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, rows: Tensor):
        return Images(self.x0[rows], pick(self.cond, rows), self.abar, self.predicts)

    def denoiser(self, unet) -> Denoiser:
        return Denoiser(unet, self.cond, self.abar, self.predicts)

    def at(self, t: float) -> Tensor:
        return torch.full((len(self),), t, device=self.x0.device)


def pick(cond: dict, rows: Tensor) -> dict:
    return {k: pick(v, rows) if isinstance(v, dict) else v[rows] for k, v in cond.items()}


def off(found: Tensor, fine: Tensor) -> float:
    """Norm of the difference over the norm of the fine one, per image; the mean over images."""
    difference, size = ((x.flatten(1).norm(dim=1)) for x in (found - fine, fine))
    return (difference / size).mean().item()


# -------------------------------------------------------------------------------------------------
# Error of tau and xt.


def results(invert_by: Callable, unet, images: Images, desc: str | None = None) -> dict:
    """{t of TIMESTEPS: (xt, tau)}; desc: of a progress bar."""
    eps, bar = images.denoiser(unet), tqdm(TIMESTEPS, desc, unit="path", disable=desc is None)
    return {t: invert_by(eps, images.x0, images.at(t), images.abar) for t in bar}


def fine_results(unet, images: Images) -> dict[int, tuple[Tensor, Tensor]]:
    return results(Inversion(OURS, FINE), unet, images, "fine paths")


def compare(found: dict, fine: dict) -> tuple[list[float], list[float]]:
    """Errors of xt and of tau at TIMESTEPS."""
    return tuple([off(found[t][i], fine[t][i]) for t in TIMESTEPS] for i in (0, 1))


def errors(unet, images: Images, fine: dict, paths: list[Inversion]) -> list[dict]:
    """[{path, xt: errors at TIMESTEPS, tau}]."""
    rows = []
    for path in tqdm(paths, desc="errors", unit="path"):
        xt, tau = compare(results(path, unet, images), fine)
        rows.append({"path": path, "xt": xt, "tau": tau})
    return rows


def first_points(unet, images: Images, fine: dict, firsts, calls) -> list[dict]:
    """[{first, calls: errors of tau, mean over TIMESTEPS}], by where the first move ends: against
    fine paths, whose own first move ends on 1, and against others, whose first move ends on 0."""
    with points(partial(starting_at, 0)):
        both, rows = (fine, fine_results(unet, images)), []
    for first in tqdm(firsts, desc="first points", unit="point"):
        row = {"first": first}
        with points(partial(starting_at, first)):
            for n in calls:
                found = results(Inversion(OURS, n), unet, images)
                row[n] = [np.mean(compare(found, one)[1]) for one in both]
        rows.append(row)
    return rows


@torch.no_grad()
def from_euler(unet, images: Images, fine: dict, moves: int) -> list[float]:
    """Differences of the fine paths' tau, at TIMESTEPS, from that of Euler's rule in many moves.

    It goes to t = 1, then even in log sigma through all TIMESTEPS, where t need not be whole: so it
    shares with the fine paths their first move alone. For models that predict eps."""
    eps, n, found = images.denoiser(unet), len(images), []
    levels = (((1 - images.abar) / images.abar).sqrt().log()).cpu().double().numpy()
    stops = levels[[1, *TIMESTEPS]]
    step = (stops[-1] - stops[0]) / moves
    shift, sigma, t = torch.zeros_like(images.x0), 0.0, 0.0
    bar = tqdm(desc="Euler's rule", unit="call")
    for i, stop in enumerate(stops):
        here = stops[max(i - 1, 0)]
        for level in np.linspace(here, stop, 1 + max(1, round((stop - here) / step)))[1:]:
            x = (images.x0 + shift) / (1 + sigma**2) ** 0.5
            shift = shift + (np.exp(level) - sigma) * eps(x, images.at(t))
            sigma, t = np.exp(level), np.interp(level, levels, np.arange(len(levels)))
            bar.update()
        if i:
            found.append(off(fine[TIMESTEPS[i - 1]][1][:n], shift / sigma))
    bar.close()
    return found


# -------------------------------------------------------------------------------------------------
# The gradient of the loss.


def gradient(policy, reference, images: Images, t: Tensor, beta: float, xt, tau) -> Tensor:
    """InPO's gradient, all parameters in one row: of the mean loss of pairs, winners first."""
    with torch.no_grad():
        err_ref = squared_error(images.denoiser(reference)(xt, t), tau)
    err = squared_error(images.denoiser(policy)(xt, t), tau)
    losses = inpo_loss(err, err_ref, beta)[0]
    grads = torch.autograd.grad(losses.mean(), list(policy.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def uniform_t(images: Images, times: int = 1) -> list[Tensor]:
    """`times` draws of t for all images, uniform for each pair."""
    n = len(images) // 2
    t = draw_timesteps(SEED, range(n * times), 1, 1, len(images.abar)).to(images.x0.device)
    return [one.repeat(2) for one in t.chunk(times)]


def gradients(policy, reference, images: Images, beta: float, paths, pairs: int) -> list[dict]:
    """[{path, cosine: with the gradient of a fine path, ratio: of their norms}], a number for each
    group of so many pairs. The policy inverts."""
    n, rows = len(images) // 2, [{"path": path, "cosine": [], "ratio": []} for path in paths]
    bar = tqdm(total=n // pairs * (1 + len(paths)), desc="gradients", unit="path")
    (t,) = uniform_t(images)
    for start in range(0, n, pairs):
        chosen = torch.arange(start, start + pairs)
        chosen = torch.cat([chosen, chosen + n])
        some, t_some = images[chosen], t[chosen]

        def of(path, some=some, t=t_some):
            bar.update()
            found = path(some.denoiser(policy), some.x0, t, some.abar)
            return gradient(policy, reference, some, t, beta, *found).double()

        fine = of(Inversion(OURS, FINE_GRADIENT))
        for row in rows:
            grad = of(row["path"])
            row["cosine"].append((grad @ fine / grad.norm() / fine.norm()).item())
            row["ratio"].append((grad.norm() / fine.norm()).item())
    bar.close()
    return rows


# -------------------------------------------------------------------------------------------------
# Several t on one path: the path to the largest passes through the others, each a training latent.


def reuse(policy, reference, images: Images, beta: float, most: int = 3) -> list[dict]:
    """[{t: latents of a path, calls, ratio, low, high}] for 2..most timesteps on one path.

    ratio: trace of the covariance of a pair's gradient, times the UNet calls that it costs, over
    the same of one t on a path of its own of 3 calls. Below 1, reuse gains. low, high: of 95 % of
    bootstrap samples of the pairs."""
    eps, n = images.denoiser(policy), len(images) // 2
    drawn = uniform_t(images, most)  # independent, so that all have the same expectation but for
    alone = [
        (t, *Inversion(OURS, 3)(eps, images.x0, t, images.abar)) for t in drawn
    ]  # tau's errors
    bar = tqdm(total=n * (2 * most - 1), desc="path reuse", unit="gradient")

    def spread(latents) -> np.ndarray:
        """Squared distance of each pair's gradient from their mean; latents: of every t."""
        grads = []
        for k in range(n):
            mine = torch.tensor([k, k + n])
            whose = mine.repeat_interleave(len(latents))  # winners, then losers
            t, xt, tau = (torch.stack(x, 1)[mine].flatten(0, 1) for x in zip(*latents, strict=True))
            grads.append(gradient(policy, reference, images[whose], t, beta, xt, tau).cpu())
            bar.update()
        grads = torch.stack(grads)
        return ((grads - grads.mean(0)).square().sum(1) * n / (n - 1)).numpy()

    def cost(times: int, calls: int) -> int:
        return calls + 4 * times  # the reference's call, the policy's, and two for its backward

    own = np.mean([spread([one]) for one in alone], 0) * cost(1, 3)
    rng, rows = np.random.default_rng(SEED), []
    for times in range(2, most + 1):
        ordered, shared = torch.stack(drawn[:times]).sort(0).values, []
        for last in range(times):  # made anew up to each t, for the same latents as in one go
            stops = [ordered[0].clamp(max=1), *ordered[: last + 1]]
            with points(lambda t, steps, abar, stops=stops: stops):
                xt, tau = Inversion(OURS, len(stops))(eps, images.x0, ordered[last], images.abar)
            shared.append((ordered[last], xt, tau))
        calls = cost(times, times + 1)
        both = np.stack([spread(shared) * calls, own])
        samples = both[:, rng.integers(n, size=(2000, n))].mean(2)
        low, high = np.quantile(samples[0] / samples[1], (0.025, 0.975))
        ratio = both[0].mean() / both[1].mean()
        rows.append({"t": times, "calls": calls, "ratio": ratio, "low": low, "high": high})
    bar.close()
    return rows


# -------------------------------------------------------------------------------------------------
# What eta adds.


def spacing_of(inversion: Inversion) -> str:
    return "uniform" if inversion.kind == PAPER else "log-sigma"


def added_variance(inversion: Inversion, t: int, abar: Tensor, eta: float) -> float:
    """The variance that noise injected by ddim_invert adds to tau, with eps held fixed.

    eta^2 / sigma_t^2  sum over the moves s -> u, but the first, of var_su / abar_u"""
    stops = invert.path(torch.tensor([t]), inversion.steps, abar, spacing_of(inversion))
    stops = torch.cat(stops)
    a, b, end = abar[stops[:-1]], abar[stops[1:]], abar[t]
    var = (1 - a) / (1 - b) * (1 - b / a)
    return float(eta**2 * (var / b).sum() * end / (1 - end))


def simulated_variance(inversion: Inversion, t: int, abar: Tensor, eta: float) -> float:
    """The same of 2^18 draws, by ddim_invert with an eps of 0; off by 1 % at most."""
    x0, noise = torch.zeros(1, 1, 512, 512), torch.Generator().manual_seed(SEED)
    options = abar, inversion.steps, eta, noise, spacing_of(inversion)
    return ddim_invert(lambda x, t: 0 * x, x0, torch.tensor([t]), *options)[1].var().item()
