"""Align SDXL or SD1.5 with pairs of pictures that people judged, by DDIM-InPO or a baseline.

    python train_inpo.py --model tiny                                      # a laptop, minutes
    python train_inpo.py --model sdxl --data PAIRS --dry-run               # the plan, every check
    deepspeed train_inpo.py --model sdxl --data PAIRS                      # every GPU of a node
    deepspeed --hostfile hosts train_inpo.py --model sdxl --data PAIRS     # many nodes
    deepspeed train_inpo.py --model sdxl --data PAIRS --lora-rank 64       # adapters alone
    deepspeed train_inpo.py --model sd15 --data PAIRS --method dpo         # a baseline

The same command again resumes. InPO is Lu et al., CVPR 2025, arXiv 2503.18454; Steps 1 and 2 are in
invert.py, Step 3 in loss.py. A method is a latent source and an objective, no more:

    inpo    xt by DDIM inversion of each image; pairwise loss
    dpo     xt by forward noise, one noise for winner and loser; the same loss   (2311.12908)
    kto     xt by forward noise; a utility of each image, liked or not           (2404.04465)
    sft     xt by forward noise; the denoising error of the winners, without a reference
    smpo, dmpo, mapo, dspo                                             (docs/objectives.md)

--latents and --objective combine any two of them; training/methods.py has the tables.

Where the job departs from the released scripts, and why:

1. All pairs of a micro-step, on all ranks, have a timestep in the same cell of the inversion's
   grid, so that all take the same number of UNet calls. Cells are visited in random permutations:
   the marginal of t stays uniform. Forward noise and --inversion-spacing log-sigma need no cells:
   there each pair's t is uniform.
2. What is random of a pair (crop, flip, dropout, noise, place of t in its cell) is a function of
   the seed and the pair's number in the run: a run resumes by index, and does not depend on the
   number of ranks as long as --micro-batch x ranks stays the same.
3. AdamW for SDXL too. Under ZeRO, Adafactor would see flat partitions: another algorithm than the
   published one.
4. The UNets are in bf16 (or fp16) with fp32 master weights. The script trains fp32 weights under
   fp16 autocast. Errors are fp32 in both; here gradients are accumulated in fp32, too.
5. KTO takes both images of every pair, at one t, weighted 80 : 20 for winner and loser, and so is
   the mean of its reference point. The released script draws single images, 80 % of them liked,
   each at its own t, and an image that has ever won a pair is only ever liked. Its launch file
   (exps/example.sh) takes 8-bit Adam, ours AdamW.
"""

from system.program import reported
from training.flags import check_flags, parse

if __name__ == "__main__":  # --help and wrong flags are answered before the seconds of imports
    with reported("train_inpo.py"):
        check_flags(parse(__doc__))

import copy
from argparse import Namespace

import deepspeed
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

import data
import model
from model import Denoiser
from system import processes
from system.lock import alone
from training import (
    adamw8bit,
    cache,
    card,
    folder,
    guard,
    held_out,
    lora,
    preview,
    quantized,
    trackers,
)
from training.held_out import HeldOut
from training.latents import draw_timesteps, generators, latents
from training.methods import OBJECTIVES, errors_of
from training.plan import Plan, asked, check, describe
from training.prediction import checked
from training.run import Run

# -------------------------------------------------------------------------------------------------
# The job.


def train(args: Namespace, plan: Plan, stop: processes.Stop):
    objective = OBJECTIVES[args.objective]
    pipeline = lora.load_start(args, plan.dtype)
    run = open_run(args, plan, pipeline, stop)
    engine, reference = start_engine(pipeline, args, plan.ds_config)
    abar = model.alphas_cumprod(pipeline)  # on the CPU, as t is: no micro-step waits for the GPU
    predicts = pipeline.scheduler.config.prediction_type
    images, at_once = plan.images_per_pair, plan.world * args.micro_batch
    if plan.held_out is not None:
        run.held_out = HeldOut(args, plan, pipeline, engine, reference, objective)
    start = run.resume(engine)
    encoder = cache.open_encoder(args, plan, pipeline, run, engine, start)
    batches = run.timed(read_batches(args, plan, encoder.pairs, start))
    if not start:
        unet = engine if reference is None else reference
        batches = checked(batches, args, plan, run, encoder, unet, abar, predicts)
    run.show(engine, pipeline, start)  # of a resumed run again: the kill may have come before

    for step in range(start, args.steps):
        for _ in range(plan.accumulation):
            run.stop_if_asked(engine, step)

            # 1. Draw pairs; winner and loser share the prompt and the timestep.
            batch = next(batches)
            noise = generators(args.seed, batch["n"])[: images * args.micro_batch]
            x0 = encoder.images(batch["pixels"][: len(noise)], noise)
            cond = model.repeat(encoder.prompts(batch["captions"]), images)
            cond = model.tell_sizes(cond, batch["sizes"][: len(noise)])
            t = draw_timesteps(args.seed, batch["n"], at_once, plan.strata, plan.timesteps)
            t = t.repeat(images)

            # 2. Invert x0 -> xt with the policy (baselines: add noise); tau explains xt.
            policy = Denoiser(engine, cond, abar, predicts)
            frozen = torch.no_grad()(Denoiser(reference, cond, abar, predicts))
            xt, tau = latents(args, policy, frozen, x0, t, abar, noise)

            # 3. Score that noise under reference and policy: squared errors, one an image.
            eps_ref = None if reference is None else frozen(xt, t)
            sure = plan.pairs.probability(batch["row"])
            errors = errors_of(args, policy(xt, t), eps_ref, tau, sure)

            # 4. Prefer the winner by more than the reference does.
            losses, diagnostics = objective.loss(args, errors)

            # 5. Backward; the engine steps at the accumulation boundary.
            engine.backward(losses.mean())
            engine.step()
            run.note(batch, t, losses, errors.err, errors.err_ref, diagnostics)
        run.log(engine, step)
        run.save_if_due(engine, step + 1)
        run.show(engine, pipeline, step + 1)
    run.finish(engine, plan)


def open_run(args: Namespace, plan: Plan, pipeline, stop: processes.Stop) -> Run:
    settings = asked(args)
    facts = card.facts(args, settings, lora.trains_adapters(args), len(plan.pairs), plan.world)
    settings |= {"data_fingerprint": plan.fingerprint, "start_identity": model.identity(pipeline)}
    shown = plan.pairs if plan.held_out is None else plan.held_out
    settings["prompts"] = processes.on_main(lambda: preview.choose_prompts(args, shown))
    if plan.held_out is not None:
        settings["held_out_fingerprint"] = data.fingerprint(plan.held_out)
    return Run(args, settings, facts, guard.limit(plan.ds_config), stop)


def read_batches(args: Namespace, plan: Plan, pairs: data.Pairs, start: int):
    """The batches of this rank from step `start` to the end."""
    workers = 0 if args.cache_latents else args.workers  # a worker would import the encoders
    return iter(
        data.loader(
            pairs, start, args.steps, dist.get_rank(), plan.world, args.micro_batch,
            plan.accumulation, workers,
        )
    )  # fmt: skip


def start_engine(pipeline, args: Namespace, ds_config: dict):
    """(policy in a DeepSpeed engine, frozen reference), both on the device, as is the pipeline.

    The reference is a copy of the UNet, under ZeRO-3 sharded as well; for LoRA the policy itself
    without its adapters, --base-weights under both. SFT and MaPO
    have none."""
    unet, adapters = pipeline.unet, lora.trains_adapters(args)
    needed = OBJECTIVES[args.objective].reference
    reference = copy.deepcopy(unet) if needed and not adapters else None
    if not adapters:
        unet.requires_grad_(True)
    if args.base_weights:
        quantized.quantize(unet, args.base_weights)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.compile:  # in place: names of weights stay
        unet.compile()
        if reference is not None:
            reference.compile()
    with trackers.starting(args.ds_config):
        engine, *_ = deepspeed.initialize(
            model=unet,
            model_parameters=[weight for weight in unet.parameters() if weight.requires_grad],
            **adamw8bit.arguments(ds_config),
            lr_scheduler=lambda optimizer: LambdaLR(
                optimizer, lambda step: min(1.0, (step + 1) / max(1, args.warmup))
            ),
        )
    guard.skip_nonfinite_steps(engine)
    pipeline.register_modules(unet=engine.module)
    pipeline.to(engine.device)
    if not needed:
        return engine, None
    if adapters:
        return engine, lora.AdapterOff(engine)
    if engine.zero_optimization_stage() == 3:
        frozen = {k: v for k, v in ds_config.items() if k not in ("optimizer", *trackers.NAMES)}
        reference, *_ = deepspeed.initialize(model=reference, config=frozen)
    return engine, reference.to(engine.device)


# -------------------------------------------------------------------------------------------------
# Around the job.


def main(argv: list[str] | None = None):
    with reported("train_inpo.py"):
        args = parse(__doc__, argv)
        processes.join()
        plan = processes.together(lambda: check(args))
        processes.agree(asked(args) | {"data": plan.fingerprint, "code": processes.code_version()})
        processes.print0(describe(args, plan))
        if args.dry_run:
            return
        if processes.on_main(lambda: folder.finished(args.out, args.steps)):
            processes.print0(
                f"{args.out} has finished its {args.steps} steps; more --steps would continue it."
            )
            return
    with reported("train_inpo.py", every_rank=True), alone(args.out):
        with reported("train_inpo.py"):
            plan = held_out.split(args, plan)
        with processes.Stop() as stop:
            train(args, plan, stop)


if __name__ == "__main__":
    main()
