"""Alignment in the plane: a mixture of Gaussians whose noise is known exactly, aligned in seconds.

The book (docs/book/) draws its figures with it. The reference is five Gaussians on a ring. Its eps
is exact at every t, so nothing is pretrained; the policy adds a small network that begins at zero.
Preferences come from a reward, a hill beside two of the Gaussians. What the best policy is at each
distance from the reference is known in closed form (`best`), and so methods are judged by how near
they come to it. Inversion and losses are those of invert.py and loss.py; a point of the plane is an
image of two numbers, (B, 2). Everything is float64, but for the errors, which are fp32 everywhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from invert import add_noise, ddim_invert, ddim_step
from loss import dpo_loss, inpo_loss, kto_loss, sft_loss, squared_error

T = 1000
# The schedule of SDXL and SD1.5.
ABAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2).cumprod(0)
SIGMA = ((1 - ABAR) / ABAR).sqrt()

# -------------------------------------------------------------------------------------------------
# The reference, the reward, and the best that alignment can do.


@dataclass(frozen=True)
class Mixture:
    """Gaussians in the plane: p(x) = sum_k weights_k N(x; means_k, variance I).

    means: (K, 2), weights: (K,), positive with sum 1."""

    means: Tensor
    variance: float
    weights: Tensor

    def log_density(self, x: Tensor) -> Tensor:
        """log p at points (B, 2): (B,)."""
        logits = self.weights.log() - _squares(x, self.means) / (2 * self.variance)
        return torch.logsumexp(logits, 1) - math.log(2 * math.pi * self.variance)

    def eps(self, x: Tensor, t: Tensor) -> Tensor:
        """The mean of the noise in x, as a perfect network would predict it: eps_fn of invert.py.

        With xbar = x / sqrt(abar_t), each Gaussian widened by sigma_t^2, and posterior weights r_k:

            eps(x, t) = sigma_t / (variance + sigma_t^2) sum_k r_k (xbar - means_k)

        x, eps: (B, 2). t: (B,) int64. It is -sqrt(1 - abar_t) times the score of the noised p."""
        sigma = SIGMA[t, None]
        xbar, wide = x / ABAR[t, None].sqrt(), self.variance + sigma**2
        share = torch.softmax(self.weights.log() - _squares(xbar, self.means) / (2 * wide), 1)
        return sigma / wide * (xbar - share @ self.means)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n independent points, (n, 2)."""
        k = torch.multinomial(self.weights, n, True, generator=generator)
        return self.means[k] + self.variance**0.5 * _normal(n, generator)


def _squares(x: Tensor, means: Tensor) -> Tensor:
    """Squared distances of points (B, 2) from means (K, 2): (B, K)."""
    return (x[:, None] - means).square().sum(-1)


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator, dtype=torch.float64)


_ANGLES = math.tau * (torch.arange(5, dtype=torch.float64) / 5 + 0.25)
REFERENCE = Mixture(
    1.3 * torch.stack([_ANGLES.cos(), _ANGLES.sin()], 1), 0.2**2, torch.full((5,), 0.2).double()
)
TOP, STEEPNESS = torch.tensor([0.9, -0.1], dtype=torch.float64), 1.5


def reward(x: Tensor) -> Tensor:
    """How good points (B, 2) are, (B,): -STEEPNESS |x - TOP|^2, at most 0. In log-odds: of two
    points, the better is preferred with probability sigmoid(difference)."""
    return -STEEPNESS * (x - TOP).square().sum(1)


def best(strength: float) -> tuple[Mixture, float, float]:
    """(p, its mean reward, its KL from the reference in nats), in closed form: the p of the largest
    mean reward - strength KL(p || reference), which is reference exp(reward / strength) / Z.

    Limit: a large strength gives the reference."""
    a, v = STEEPNESS / strength, REFERENCE.variance
    shrink, far = 1 + 2 * a * v, (REFERENCE.means - TOP).square().sum(1)
    logits = REFERENCE.weights.log() - a * far / shrink - math.log(shrink)
    log_z, weights = torch.logsumexp(logits, 0), torch.softmax(logits, 0)
    p = Mixture((REFERENCE.means + 2 * a * v * TOP) / shrink, v / shrink, weights)
    spread = (p.means - TOP).square().sum(1) + 2 * p.variance
    mean = float(-STEEPNESS * weights @ spread)
    return p, mean, mean / strength - float(log_z)


def draw_pairs(n: int, generator: torch.Generator) -> Tensor:
    """x0 of n pairs, (2n, 2), winners first: two points of the reference each, judged by someone
    who prefers the better with probability sigmoid(difference in reward)."""
    a, b = REFERENCE.sample(n, generator), REFERENCE.sample(n, generator)
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    first = (uniform < torch.sigmoid(reward(a) - reward(b)))[:, None]
    return torch.cat([a.where(first, b), b.where(first, a)])


# -------------------------------------------------------------------------------------------------
# Training: the loop of train_inpo.py in the plane.


class Policy(nn.Module):
    """eps of the reference plus a network of two hidden layers, which is zero at the start."""

    def __init__(self, width: int = 64):
        super().__init__()
        sizes = [(6, width), (width, width), (width, 2)]
        self.layers = nn.ModuleList(nn.Linear(a, b, dtype=torch.float64) for a, b in sizes)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = SIGMA[t, None].log()
        h = torch.cat([x, level / 3, level.sin(), level.cos(), (level / 3) ** 2], 1)
        for layer in self.layers[:-1]:
            h = nn.functional.silu(layer(h))
        return REFERENCE.eps(x, t) + self.layers[-1](h)


METHODS = ("InPO", "DPO", "KTO", "SFT")


def latents(method: str, inverter: Callable, x0: Tensor, t: Tensor, generator: torch.Generator):
    """(xt, tau), (2P, 2) each: inverted for InPO; noised by one noise a pair for DPO, one an image
    for KTO and SFT."""
    if method == "InPO":
        return ddim_invert(inverter, x0, t, ABAR, generator=generator)
    noise = _normal(len(x0), generator)
    if method == "DPO":
        noise = noise.chunk(2)[0].repeat(2, 1)
    return add_noise(x0, noise, ABAR[t]), noise


def losses_of(method: str, err: Tensor, err_ref: Tensor, beta: float) -> Tensor:
    """The losses of loss.py, one a pair or an image. KTO's reward is beta (err_ref - err), without
    the 1/2 of the others, so it gets half of beta."""
    if method == "KTO":
        return kto_loss(err, err_ref, beta / 2)[0]
    if method == "SFT":
        return sft_loss(err.chunk(2)[0])
    return (inpo_loss if method == "InPO" else dpo_loss)(err, err_ref, beta)[0]


def train(
    method: str, beta: float = 10.0, seed: int = 0, steps: int = 150, lr: float = 2e-3,
    batch: int = 128, pool: Tensor | None = None, by_reference: bool = False,
    report: Callable[[int, Policy], None] | None = None,
) -> Policy:  # fmt: skip
    """Align a policy with Adam on `batch` pairs a step, 2 to 4 seconds.

    pool: x0 of a fixed set of pairs, winners first, to draw from; else each step draws new ones.
    by_reference: the reference inverts, not the policy. report(steps done, policy): after each."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Policy()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    for step in range(1, steps + 1):
        # 1. Draw pairs; winner and loser share the timestep.
        if pool is None:
            x0 = draw_pairs(batch, generator)
        else:
            pick = torch.randint(len(pool) // 2, (batch,), generator=generator)
            x0 = torch.cat([side[pick] for side in pool.chunk(2)])
        t = torch.randint(T, (batch,), generator=generator).repeat(2)
        # 2. Invert x0 -> xt, or add noise; tau explains xt.
        inverter = REFERENCE.eps if by_reference else policy
        xt, tau = latents(method, inverter, x0, t, generator)
        # 3. Score that noise under reference and policy.
        err_ref = squared_error(REFERENCE.eps(xt, t), tau)
        err = squared_error(policy(xt, t), tau)
        # 4. Prefer the winner by more than the reference does.
        losses = losses_of(method, err, err_ref, beta)
        # 5. Backward, and a step.
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        if report:
            report(step, policy)
    return policy


# -------------------------------------------------------------------------------------------------
# Drawing from a policy, and judging it. Its density is exact for the sampler as it is: each DDIM
# step is a map of the plane, whose Jacobian has 2 x 2 entries.


def _levels(moves: int) -> list[int]:
    """Timesteps whose sigma is even in log sigma, from 0 to T - 1, without repetition."""
    wanted = torch.logspace(SIGMA[0].log10(), SIGMA[-1].log10(), moves, dtype=torch.float64)
    return torch.searchsorted(SIGMA, wanted).clamp(max=T - 1).unique().tolist()


CLEAN = -1  # beside the timesteps: the clean image, abar = 1, which a model is shown as t = 0
UP = [CLEAN, *_levels(40)]
DOWN = UP[::-1]


def flow(eps_fn: Callable, x: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    """(where points (B, 2) arrive, log |det| of the whole map (B,)), by DDIM steps over levels."""
    log_det = torch.zeros(len(x), dtype=x.dtype)
    abar = torch.cat([ABAR, torch.ones(1, dtype=ABAR.dtype)])  # [CLEAN] is the last
    for here, there in zip(levels, levels[1:], strict=False):
        x = x.detach().requires_grad_()
        eps = eps_fn(x, torch.full((len(x),), max(here, 0)))
        y = ddim_step(x, eps, abar[here].expand(len(x)), abar[there].expand(len(x)))
        (a, b), (c, d) = (
            torch.autograd.grad(y[:, i].sum(), x, retain_graph=i == 0)[0].unbind(1) for i in (0, 1)
        )
        x, log_det = y.detach(), log_det + (a * d - b * c).abs().log()
    return x, log_det


def draw(eps_fn: Callable, n: int = 2000, seed: int = 7) -> tuple[Tensor, Tensor]:
    """(n points that a model draws in DDIM steps from N(0, I), the log of its density there)."""
    start = _normal(n, torch.Generator().manual_seed(seed))
    x, log_det = flow(eps_fn, start, DOWN)
    return x, _log_normal(start) - log_det


def log_density(eps_fn: Callable, x: Tensor) -> Tensor:
    """log of a model's density at points (B, 2), by inversion: (B,)."""
    noise, log_det = flow(eps_fn, x, UP)
    return _log_normal(noise) + log_det


def _log_normal(x: Tensor) -> Tensor:
    return -x.square().sum(1) / 2 - math.log(math.tau)


@dataclass(frozen=True)
class Judgement:
    """Of the points that a model draws. reward: the mean. distance: KL(model || reference) in nats.
    faithful: the share of points that lie where 99 % of the reference's do. drift: the mean squared
    difference of its predicted noise from the reference's, on noised points of the reference."""

    reward: float
    distance: float
    faithful: float
    drift: float


@torch.no_grad()
def _drift(eps_fn: Callable, n: int = 2000) -> float:
    generator = torch.Generator().manual_seed(8)
    x0, t = REFERENCE.sample(n, generator), torch.arange(n) % T
    xt = add_noise(x0, _normal(n, generator), ABAR[t])
    return squared_error(eps_fn(xt, t), REFERENCE.eps(xt, t)).mean().item()


def judge(eps_fn: Callable, n: int = 2000) -> Judgement:
    x, log_p = draw(eps_fn, n)
    log_ref = REFERENCE.log_density(x)
    own = REFERENCE.log_density(REFERENCE.sample(20_000, torch.Generator().manual_seed(9)))
    inside = (log_ref > own.quantile(0.01)).double().mean().item()
    return Judgement(
        reward(x).mean().item(), (log_p - log_ref).mean().item(), inside, _drift(eps_fn)
    )


# -------------------------------------------------------------------------------------------------
# Pictures.


def panels(columns: int, titles: list[str], size: float = 3.0, plane: bool = True):
    """(figure, its axes) with titles; plane: axes that show the plane, -2.2 to 2.2."""
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(size * columns, size * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, title in zip(every, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if plane:
            axes.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=[], yticks=[], aspect="equal")
    return figure, every


def show_density(axes, log_p: Callable[[Tensor], Tensor], points: int = 90):
    """The density exp(log_p) as shades of blue, and the reward's contours over it."""
    line = torch.linspace(-2.2, 2.2, points, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    shade = log_p(grid).exp().reshape(points, points).T
    axes.imshow(
        shade.sqrt(), origin="lower", extent=(-2.2, 2.2) * 2, cmap="Blues", interpolation="bilinear"
    )
    heights = reward(grid).reshape(points, points).T
    axes.contour(line, line, heights, [-6, -3, -1, -0.2], colors="C1", linewidths=0.8)
