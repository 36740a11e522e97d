"""Align SDXL or SD1.5 with pairs of pictures that people judged, by DDIM-InPO or a baseline.

    deepspeed train_inpo.py --model sdxl                      # every GPU of a node, paper's recipe
    deepspeed --hostfile hosts train_inpo.py --model sdxl     # many nodes
    python train_inpo.py --model tiny                         # a laptop without a GPU, minutes
    deepspeed train_inpo.py --model sd15 --method dpo         # a baseline, by its own recipe
    deepspeed train_inpo.py --model sdxl --lora-rank 64       # adapters in place of all weights
    python train_inpo.py --model sdxl --dry-run               # the plan and every check, no more

The same command again resumes. InPO is Lu et al., CVPR 2025, arXiv 2503.18454; Steps 1 and 2 are in
invert.py, Step 3 in loss.py. A method is a latent source and an objective, no more:

    inpo    xt by DDIM inversion of each image; pairwise loss
    dpo     xt by forward noise, one noise for winner and loser; the same loss   (2311.12908)
    kto     xt by forward noise; a utility of each image, liked or not           (2404.04465)
    sft     xt by forward noise; the denoising error of the winners, without a reference

Where the job departs from the released scripts, and why:

1. All pairs of a micro-step, on all ranks, have a timestep in the same cell of the inversion's
   grid, so that all take the same number of UNet calls. Cells are visited in random permutations:
   the marginal of t stays uniform. Forward noise needs no cells: there each pair's t is uniform.
2. What is random of a pair (crop, flip, dropout, noise, place of t in its cell) is a function of
   the seed and the pair's number in the run: a run resumes by index, and does not depend on the
   number of ranks as long as --micro-batch x ranks stays the same.
3. AdamW for SDXL too. Under ZeRO, Adafactor would see flat partitions: another algorithm than the
   published one.
4. Warm-up counts optimizer steps, whatever the number of processes, and its first step moves.
5. Errors, logits and the inversion's state are fp32, and so is the accumulation of gradients.
6. KTO takes both images of every pair, at one t, weighted 80 : 20 for winner and loser, and so is
   the mean of its reference point. The released script draws single images, 80 % of them liked,
   each at its own t, and an image that has ever won a pair is only ever liked: another population.
"""

import copy
import functools
from argparse import Namespace

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

import data
import model
from invert import add_noise, ddim_invert, randn_like
from loss import dpo_loss, inpo_loss, kto_loss, squared_error
from system import processes
from system.program import reported
from training import card, guard, lora, plan
from training.folder import alone, finished
from training.run import Run, due

# -------------------------------------------------------------------------------------------------
# Randomness as a function of (seed, place in the run).

STRATUM, TIME, NOISE = 101, 102, 103  # keep the random streams of one seed apart


def stratum(seed: int, micro_step: int, cells: int) -> int:
    """The cell of the grid that all pairs of a micro-step share, on every rank.

    Each cycle of `cells` micro-steps visits every cell once, in a random order."""
    cycle, place = divmod(micro_step, cells)
    return int(np.random.default_rng([seed, STRATUM, cycle]).permutation(cells)[place])


def draw_timesteps(seed: int, cell: int, numbers, cells: int, timesteps: int) -> torch.Tensor:
    """t uniform in a cell of 0..timesteps-1, (P,) int64, for the pairs of these numbers (P)."""
    width = timesteps // cells
    drawn = [np.random.default_rng([seed, TIME, int(n)]).integers(width) for n in numbers]
    return cell * width + torch.tensor(drawn, dtype=torch.int64)


def generators(seed: int, numbers) -> list[torch.Generator]:
    """One per image, winners first; on the CPU, so that every device draws the same."""
    streams = [
        np.random.default_rng([seed, NOISE, side, int(n)]) for side in (0, 1) for n in numbers
    ]
    return [torch.Generator().manual_seed(int(stream.integers(2**63))) for stream in streams]


# -------------------------------------------------------------------------------------------------
# A method is a latent source and an objective.


def latents(args: Namespace, policy, frozen, x0, t, abar, noise) -> tuple[torch.Tensor, ...]:
    """(xt, tau): the images at t and the noise that explains them.

    InPO: inversion, by the policy. The others: forward noise, for DPO the same on both images of a
    pair. policy, frozen: eps_fn(x, t). noise: a generator per image."""
    if args.method == "inpo":
        walker = policy if args.inverter == "policy" else frozen
        return ddim_invert(walker, x0, t, abar, args.inversion_steps, args.eta, noise)
    tau = randn_like(x0, noise)
    if args.method == "dpo":
        tau = tau.chunk(2)[0].repeat(2, 1, 1, 1)
    return add_noise(x0, tau, abar[t]), tau


def objective(args: Namespace, err, err_ref) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(losses, diagnostics) of the errors of a micro-step, winners first; SFT has winners alone."""
    if args.method == "sft":
        return err, {"err_winner": err.detach().mean()}
    if args.method == "kto":
        liked, disliked = 2 * args.liked_share, 2 * (1 - args.liked_share)  # their mean is 1
        kl = reference_point(err_ref - err, liked, disliked)
        return kto_loss(err, err_ref, args.beta, None, kl, liked, disliked)
    return (inpo_loss if args.method == "inpo" else dpo_loss)(err, err_ref, args.beta)


def reference_point(g: torch.Tensor, liked: float, disliked: float) -> torch.Tensor:
    """KTO's kl: the weighted mean of g = err_ref - err over the images of all ranks, at least 0."""
    winner, loser = g.detach().chunk(2)
    kl = (liked * winner + disliked * loser).mean() / 2
    dist.all_reduce(kl)
    return (kl / dist.get_world_size()).clamp(min=0)


# -------------------------------------------------------------------------------------------------
# The job.


def train(args: Namespace, todo: plan.Plan, stop: processes.Stop):
    pipeline = load_start(args, todo.dtype)
    found = {"data_fingerprint": todo.fingerprint, "start_identity": model.identity(pipeline)}
    asked, adapters = plan.asked(args), plan.trains_adapters(args)
    facts = card.facts(args, asked, adapters, len(todo.pairs), todo.world)
    job = Run(args, asked | found, facts, guard.limit(todo.ds_config), stop)
    engine, reference = start_engine(pipeline.unet, args, todo.ds_config)
    pipeline.register_modules(unet=engine.module)
    pipeline.to(engine.device)
    abar = model.alphas_cumprod(pipeline).to(engine.device)
    predict = functools.partial(
        model.predict_noise, abar=abar, prediction_type=pipeline.scheduler.config.prediction_type
    )

    start_fp32 = functools.partial(load_start, args, torch.float32)
    start = job.resume(engine, start_fp32)
    pairs = data.Pairs(
        todo.pairs, todo.resolution, args.seed, args.crop, args.flip, args.caption_dropout
    )
    batches = iter(
        data.loader(
            pairs, start, args.steps, dist.get_rank(), todo.world, args.micro_batch,
            todo.accumulation, args.workers,
        )
    )  # fmt: skip
    job.show(engine, pipeline, start)  # of a resumed run once more: the kill may have come before

    for step in range(start, args.steps):
        for micro in range(todo.accumulation):
            job.stop_if_asked(engine, step)

            # 1. Draw pairs; winner and loser share the prompt and the timestep.
            batch = next(batches)
            images = todo.sides * args.micro_batch
            noise = generators(args.seed, batch["n"])[:images]
            x0 = model.encode_images(pipeline, batch["pixels"][:images], noise)
            cond = model.encode_prompts(pipeline, batch["captions"], todo.resolution)
            cond = model.repeat(cond, todo.sides)
            cell = stratum(args.seed, step * todo.accumulation + micro, todo.strata)
            t = draw_timesteps(args.seed, cell, batch["n"], todo.strata, todo.timesteps)
            t = t.repeat(todo.sides).to(engine.device)

            # 2. Invert x0 -> xt with the policy (baselines: add noise); tau explains xt.
            policy = functools.partial(predict, engine, cond=cond)
            frozen = functools.partial(torch.no_grad()(predict), reference, cond=cond)
            xt, tau = latents(args, policy, frozen, x0, t, abar, noise)

            # 3. Score that noise under reference and policy.
            err_ref = None if reference is None else squared_error(frozen(xt, t), tau)
            err = squared_error(policy(xt, t), tau)

            # 4. Prefer the winner by more than the reference does.
            losses, diagnostics = objective(args, err, err_ref)

            # 5. Backward; the engine steps at the accumulation boundary.
            engine.backward(losses.mean())
            engine.step()
            job.note(batch, t, losses, err, err_ref, diagnostics)

        job.log(engine, step)
        if due(step + 1, args.checkpoint_every, args.steps):
            job.save(engine, step + 1)
        job.show(engine, pipeline, step + 1)

    job.finish(engine, start_fp32, functools.partial(work, args, todo))


def load_start(args: Namespace, dtype: torch.dtype):
    """The pipeline that training starts from; of a LoRA run its UNet has the adapters.

    In half precision the UNet's weights are those in fp32, rounded once: what the policy's fp32
    master weights round to while they have not moved, and what the reference stays."""
    pipeline = model.load_pipeline(args.model, args.unet, args.vae, dtype)
    if args.lora and args.lora_start == "merge":
        model.fuse_lora(pipeline, args.lora)
    elif args.lora:
        lora.adopt(pipeline, args.lora)
    if args.lora_rank:
        lora.attach(pipeline.unet, args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)
    if args.lora and args.lora_start == "merge" and dtype != torch.float32:  # or round it twice
        pipeline.unet.load_state_dict(load_start(args, torch.float32).unet.state_dict())
    return pipeline


def start_engine(unet: torch.nn.Module, args: Namespace, ds_config: dict):
    """(policy in a DeepSpeed engine, frozen reference), both on the device.

    The reference is a copy of the UNet, under ZeRO-3 sharded as well; for LoRA the policy itself
    without its adapters. SFT has none."""
    adapters = plan.trains_adapters(args)
    reference = None if adapters or args.method == "sft" else copy.deepcopy(unet)
    if not adapters:
        unet.requires_grad_(True)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    engine, *_ = deepspeed.initialize(
        model=unet,
        model_parameters=[weight for weight in unet.parameters() if weight.requires_grad],
        config=ds_config,
        lr_scheduler=lambda optimizer: LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / max(1, args.warmup))
        ),
    )
    guard.skip_nonfinite_steps(engine)
    if args.method == "sft":
        return engine, None
    if adapters:
        return engine, lora.AdapterOff(engine)
    if engine.zero_optimization_stage() == 3:
        frozen = {k: v for k, v in ds_config.items() if k not in ("optimizer", "tensorboard")}
        reference, *_ = deepspeed.initialize(model=reference, config=frozen)
    return engine, reference.to(engine.device)


# -------------------------------------------------------------------------------------------------
# Around the job.


def work(args: Namespace, todo: plan.Plan) -> dict:
    """What the run had to do, counted, over all ranks."""
    cells = (stratum(args.seed, m, todo.strata) for m in range(args.steps * todo.accumulation))
    inversion = 0 if args.method != "inpo" else np.mean([cell + 1 for cell in cells])
    calls, flops = plan.work(args, todo, inversion)
    done = {"method": args.method, "steps": args.steps, "pairs": args.steps * args.batch}
    return done | {"unet_calls": round(calls), "flops": flops}


def main(argv: list[str] | None = None):
    with reported("train_inpo.py"):
        args = plan.parse(__doc__, argv)
        processes.join()
        todo = processes.together(lambda: plan.check(args))
        processes.agree(
            plan.asked(args) | {"data": todo.fingerprint, "code": processes.code_version()}
        )
    if processes.is_main():
        print(plan.describe(args, todo), flush=True)
    if args.dry_run:
        return
    if finished(args.out, args.steps):
        processes.print0(
            f"{args.out} has finished its {args.steps} steps; more --steps would continue it."
        )
        return
    model.quiet()
    with (
        reported("train_inpo.py", every_rank=True),
        alone(args.out),
        processes.Stop() as stop,
    ):
        train(args, todo, stop)


if __name__ == "__main__":
    main()
