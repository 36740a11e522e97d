"""DDIM inversion: from a clean image to the noisy latent that the model would have drawn it from.

Needs torch alone; copy this file into any trainer. The model enters as `eps_fn(x, t) -> eps`.
Symbols, for B images (or latents) of shape (B, C, H, W):

    t        timestep, 0..T-1; T is 1000 for SDXL and SD1.5
    abar_t   prod_{i<=t} (1 - beta_i), the signal left at t, diffusers' `alphas_cumprod[t]`; beta_i
             is the noise schedule's, not the beta of loss.py
    sigma_t  sqrt((1 - abar_t) / abar_t), the noise level; a clean image has abar = 1, sigma = 0
    x0, xt   the clean image; the image at t
    eps      the noise in xt, as the model eps_theta predicts it
    tau      the noise that explains xt as a noised x0
    xbar     x / sqrt(abar); in xbar and sigma, deterministic DDIM is Euler's rule for the ODE
             d xbar / d sigma = eps_theta(xt, t)   (DDIM, 2010.02502, eq. 14)

abar is fp32 or float64; half precision loses the 1 - abar of small t, and raises ValueError. In a
schedule it lies in [0, 1). At 0, the end of zero terminal SNR (2305.08891), sigma is infinite, and
`finite_sigma` mends it. The arithmetic is fp32, or float64 for float64 images. `ddim_invert`
returns that, the others the dtype of their images.

Where this departs from InPO's poster and from its released script (train.py at a9cfc4d):

1. The poster prints Step 2 without the sqrt(abar_to) of its second term. That is no DDIM step.
2. The script's moves end on 1, 101, ..., 901: past most t, by up to 99, and short of every t above
   901. It then shows the model t. Here the last move ends on t.
3. The script starts from abar = alphas_cumprod[0] and shows the model timestep -99 there. Here the
   start is the clean image, abar = 1, shown as timestep 0.
4. The script takes the path of the first t for the whole batch. Here each image has its own.
5. The script solves xt for tau, with abar in fp16. Here tau is summed up on the way, in fp32.
6. Beside the paper's path there is one of fewer calls and smaller errors, spacing "log-sigma".
"""

from collections.abc import Callable

import torch
from torch import Tensor


def _sigma(abar: Tensor) -> Tensor:
    return ((1 - abar) / abar).sqrt()


def finite_sigma(abar: Tensor) -> Tensor:
    """The abar of a schedule, (T,), at least 2^-24. Raises ValueError for any outside [0, 1), since
    at abar = 1 there is no noise for tau to explain."""
    if not 0 <= abar.min() <= abar.max() < 1:  # nor NaN
        raise ValueError(f"abar of a schedule lies in [0, 1); got {abar.min()} to {abar.max()}.")
    return abar.clamp(min=2**-24)


def _per_image(abar: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), on the device of the images x and in the dtype of the arithmetic."""
    if abar.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"abar is {abar.dtype}, too coarse; pass the schedule's own fp32 table.")
    dtype = torch.promote_types(x.dtype, torch.float32)
    return abar.to(x.device, dtype).reshape(-1, *[1] * (x.ndim - 1))


def _like(result: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return result.to(torch.promote_types(a.dtype, b.dtype))


# -------------------------------------------------------------------------------------------------
# Step 1, one-step generation, and its inverse: what explains xt.


def predict_x0(xt: Tensor, eps: Tensor, abar_t: Tensor) -> Tensor:
    """The clean image that one reparametrized DDIM step makes of xt (InPO, Step 1).

    x0(t) = xt / sqrt(abar_t) - sigma_t eps

    xt, eps, x0(t): (B, C, H, W). abar_t: (B,). Limit: the true noise gives the true image."""
    abar = _per_image(abar_t, xt)
    return _like(xt / abar.sqrt() - _sigma(abar) * eps, xt, eps)


def implied_noise(x0: Tensor, xt: Tensor, abar_t: Tensor) -> Tensor:
    """The noise that explains xt as a noised x0: xt = sqrt(abar_t) (x0 + sigma_t tau), solved.

    tau = (xt - sqrt(abar_t) x0) / sqrt(1 - abar_t)

    x0, xt, tau: (B, C, H, W). abar_t: (B,), below 1. Limit: it undoes `add_noise`. As abar_t -> 1
    it loses digits, as a difference of nearly equal images; `ddim_invert` returns a better tau."""
    abar = _per_image(abar_t, xt)
    return _like((xt - abar.sqrt() * x0) / (1 - abar).sqrt(), x0, xt)


def add_noise(x0: Tensor, noise: Tensor, abar_t: Tensor) -> Tensor:
    """Forward diffusion, for the methods that do not invert (DDPM, 2006.11239, eq. 4).

    xt = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise

    x0, noise, xt: (B, C, H, W). abar_t: (B,). Limit: abar_t = 1 gives x0."""
    abar = _per_image(abar_t, x0)
    return _like(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, x0, noise)


# -------------------------------------------------------------------------------------------------
# Step 2, inversion: xbar_to = xbar_from + (sigma_to - sigma_from) eps, again and again.


def ddim_step(x: Tensor, eps: Tensor, abar_from: Tensor, abar_to: Tensor) -> Tensor:
    """One deterministic DDIM step between any two noise levels, up or down (InPO, Step 2).

    x_to = sqrt(abar_to / abar_from) x + sqrt(abar_to) (sigma_to - sigma_from) eps

    x, eps, x_to: (B, C, H, W). abar_from, abar_to: (B,). Limits: abar_to = abar_from gives x,
    abar_to = 1 gives `predict_x0`."""
    a, b = _per_image(abar_from, x), _per_image(abar_to, x)
    return _like((b / a).sqrt() * x + b.sqrt() * (_sigma(b) - _sigma(a)) * eps, x, eps)


def path(t: Tensor, steps: int, abar: Tensor, spacing: str) -> list[Tensor]:
    """The timesteps where the moves to t, (B,), end, (B,) each; abar: (T,). Some have length zero.

    "uniform", the paper's: the right edges of `steps` equal cells of 0..T-1 (99, 199, ..., 999 for
    10 of 1000) below t, then t. "log-sigma", ours, `steps` moves for every t: min(1, t), timesteps
    whose sigma is nearest to levels that are even in log sigma, then t."""
    T = len(abar)
    if spacing == "uniform" and 1 <= steps <= T:
        edges = torch.arange(1, steps + 1) * T // steps - 1
        cells = int(torch.searchsorted(edges, int(t.max()))) + 1  # up to that of the largest t
        return [t.clamp(max=edge) for edge in edges[:cells].tolist()]
    if spacing == "log-sigma" and 2 <= steps <= T:
        sigma, points = _sigma(abar), []
        first = sigma[t.clamp(max=1)]
        for share in torch.linspace(0, 1, steps).tolist()[:-1]:
            wanted = first * (sigma[t] / first) ** share
            above = torch.searchsorted(sigma, wanted).clamp(1, T - 1)
            points.append(above - (wanted - sigma[above - 1] < sigma[above] - wanted).long())
        return [*points, t]
    raise ValueError(f"There is no '{spacing}' path of {steps} steps over {T} timesteps.")


def randn_like(x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """N(0, I) like x, drawn on the generator's device; of a list, each draws one image."""
    if isinstance(generator, list):
        return torch.stack([randn_like(image, g) for image, g in zip(x, generator, strict=True)])
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


@torch.no_grad()
def ddim_invert(
    eps_fn: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, abar: Tensor,
    steps: int = 10, eta: float = 0.1,
    generator: torch.Generator | list[torch.Generator] | None = None, spacing: str = "uniform",
    renoise: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Invert clean images to timesteps t; returns xt and the noise that explains it (InPO, Step 2).

    eps_fn is called once a move, at the point just left. The moves follow `path`: k + 1 of them for
    a t in cell k of the uniform grid, or `steps` for every t. On the log-sigma path, from the third
    move on, eps is taken as linear in log sigma through the last two points and integrated exactly
    in sigma (two-step Adams-Bashforth). r, s, u: the sigmas, and names, of three points in turn:

        xbar_u = xbar_s + (u - s) eps_s + (u log(u/s) - (u - s)) / log(s/r) (eps_s - eps_r)

    renoise: eps is predicted once more, at the point that the move reaches, and the mean of both is
    taken for the move (Heun's rule, one correction of ReNoise, 2403.14602; SmPO, 2506.02698).

    After each move but the first (the clean image's abar_s is 1), noise n is injected:

        x_u += eta sqrt(var) n,   n ~ N(0, I),   var = (1-abar_s)/(1-abar_u) (1 - abar_u/abar_s)

    tau is all that was added to xbar, over sigma_t, so that xt = sqrt(abar_t) (x0 + sigma_t tau).
    It is the training target of Step 3.

    x0: clean, (B, C, H, W). t: (B,) int64 in 0..T-1, each its own. abar: (T,). With both on the CPU
    nothing waits for x0's device. eps_fn(x, t), x in fp32, t on x0's device -> eps, any dtype. eta:
    0 is the deterministic inversion, 1 injects as DDPM does. generator: one, of x0's device or the
    CPU, or a list of one per image, which draws for each what it would get alone. Returns xt and
    tau, as x0. Raises ValueError for t, abar, steps or spacing out of range, or a list too short.
    Limit: where eps_fn always returns the same eps and eta is 0, tau = eps."""
    if isinstance(generator, list) and len(generator) != len(x0):
        raise ValueError(f"{len(x0)} images need as many generators; got {len(generator)}.")
    lowest, highest = torch.stack(t.aminmax()).tolist()
    if lowest < 0 or highest >= len(abar):
        raise ValueError(f"t must lie in 0..{len(abar) - 1}; got {lowest} to {highest}.")
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    abar = finite_sigma(_per_image(abar, torch.empty(0, dtype=x0.dtype))).to(t.device)

    shift = torch.zeros_like(x0)  # sigma * tau so far: xbar - x0
    t_from, a, before = torch.zeros_like(t), _per_image(torch.ones_like(abar[t]), x0), None
    for t_to in path(t, steps, abar, spacing):
        b = _per_image(abar[t_to], x0)
        s, u = _sigma(a), _sigma(b)
        eps = eps_fn(a.sqrt() * (x0 + shift), t_from.to(x0.device)).to(x0)
        if renoise:
            reached = b.sqrt() * (x0 + (u - s) * eps + shift)
            eps = (eps + eps_fn(reached, t_to.to(x0.device)).to(x0)) / 2
        shift = shift + (u - s) * eps
        if before and spacing == "log-sigma":
            eps_r, r = before  # r = 0, the clean image: no weight, as after a move of length zero
            weight = (u * (u / s).log() - (u - s)) / (s / r).log()
            shift = shift + weight.where(s > r, 0) * (eps - eps_r)
        if eta > 0:
            var = (1 - a) / (1 - b) * (1 - b / a)
            shift = shift + eta * (var / b).sqrt() * randn_like(x0, generator)  # in units of xbar
        t_from, a, before = t_to, b, (eps, s)
    torch.clear_autocast_cache()  # or the caller gets the weights that were cast without gradients
    return a.sqrt() * (x0 + shift), shift / _sigma(a)
