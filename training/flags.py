"""The flags of train_inpo.py. Nothing here takes long to import: --help is answered at once."""

import argparse
from pathlib import Path

from evaluation import own
from evaluation.published import TITLES
from system.files import UserError
from system.hub import add_model_flags, check_local, check_pairs, say, short_name
from system.program import Parser
from training.methods import LATENTS, OBJECTIVES
from training.recipes import (
    INVERSION_STEPS,
    METHODS,
    NAMES,
    crossed,
    recipe_of,
    recipe_table,
)


def parse(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; their defaults are a recipe of --model. Raises UserError for an unknown one."""
    first = Parser("train_inpo.py", add_help=False)
    first.add_argument("--model", default="sdxl")
    first.add_argument("--method", choices=METHODS, default="inpo")
    first.add_argument("--recipe", choices=NAMES, default="published")
    first.add_argument("--lora")
    first.add_argument("--lora-start", default="continue")
    first.add_argument("--inversion-spacing")
    first.add_argument("--latents", choices=LATENTS)
    first.add_argument("--objective", choices=OBJECTIVES)
    known = first.parse_known_args(argv)[0]

    parser = Parser("train_inpo.py", description, epilog=recipe_table())
    switch = argparse.BooleanOptionalAction
    # fmt: off

    add = parser.add_argument_group("model").add_argument
    add("--model", default="sdxl",
        help="sdxl, sd15, tiny, a hub id, a folder in diffusers layout, or a single .safetensors "
             "file in the original one; picks the recipe")
    add_model_flags(add)
    add("--unet", metavar="PATH",
        help="UNet (folder or hub id) in place of the pipeline's, as start and as reference")
    add("--vae", metavar="PATH",
        help="VAE checkpoint in place of the pipeline's (SDXL's own overflows in fp16)")
    add("--gradient-checkpointing", action=switch, help="less memory for a quarter more work")

    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="PATH",
        help="pairs: a .parquet, .csv, .jsonl or .tar file, a folder with them or with pictures "
             "(NAME_winner.png, NAME_loser.png, NAME.txt), a folder saved by datasets, a hub id; "
             "'toy' draws the tiny model's; Pick-a-Pic v2 left the hub in 2025: give a copy")
    add("--columns", nargs="+", default=[], metavar="ROLE=NAME",
        help="which columns hold a pair, if their names are none that are known: winner=a loser=b "
             "caption=c, or image_0=a image_1=b label_0=c caption=d; docs/data.md has all roles")
    add("--split", default="train", help="split of a hub id or DatasetDict")
    add("--partial-data", action="store_true",
        help="train on a folder that lacks some of the files that its names count (train-00000-of-"
             "00645)")
    add("--max-broken", type=float, default=0.05, metavar="P",
        help="share of the pairs, 0 to 1, that may be broken: others take their place, and "
             "broken.jsonl lists them")
    add("--held-out", type=share_or_source, metavar="SHARE|SOURCE", default=0.0,
        help="pairs that are kept from training, and on which loss and accuracy are logged with "
             "the sample pictures and at the end: a share of them, 0 to 1, that has no caption and "
             "no picture in common with the others; or a second source, as of --data")
    add("--resolution", type=int, metavar="PIXELS",
        help="side of the square; if not given the model's own (SDXL 1024, SD1.5 512, tiny 64)")
    add("--stream", type=int, metavar="N", default=0,
        help="read parquet files where they are, not from a copy of their size in the Arrow cache: "
             "pairs come from N row groups at a time (16, say), which each loader process keeps in "
             "memory; 0: copy them")
    add("--buckets", type=int, metavar="N", default=0,
        help="let pictures keep their ratio, from 1:2 to 2:1, in about as many pixels: N pairs in "
             "a row have one (height, width), N a multiple of --micro-batch x ranks; 0: squares, "
             "as published")
    add("--true-sizes", action="store_true",
        help="SDXL: tell the model each picture's own size and crop, as in its training; if not "
             "given, as published, those of what is left of it")
    add("--crop", choices=("center", "random"), default="center",
        help="what is kept once the shorter side has that length")
    add("--flip", action=switch, default=True, help="mirror half of the pairs")
    add("--caption-dropout", type=float, metavar="P",
        help="share of the pairs, 0 to 1, that are trained without their caption")
    add("--workers", type=int, metavar="N", help="loader processes per rank")
    add("--cache-latents", action="store_true",
        help="encode all pictures and captions once, before the first step, and keep them in the "
             "run's folder, for a small set that is seen more than once; VAE and text encoders "
             "then leave the device (the plan says how much disk it takes)")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="inpo", help="picks the recipe, too")
    add("--recipe", choices=NAMES, default="published",
        help="the defaults of this page: published, or lora, adapters for some hundreds or "
             "thousands of pairs on one card; any flag overrides its own")
    add("--latents", choices=LATENTS,
        help="where xt comes from, in place of the method's own. inversion: DDIM's; renoise: with "
             "two predictions a move, for SmPO; released: as InPO's script does it, with its "
             "faults, to compare with; noise: forward noise")
    add("--objective", choices=OBJECTIVES,
        help="the loss, in place of the method's own; docs/objectives.md has what each is")
    add("--safe-loser", type=float, metavar="MU",
        help="of a pairwise objective: scale each loser's gradient so that its winner's error "
             "falls at least MU times as fast as without it (Diffusion-SDPO; 0 to 1)")
    add("--gamma", type=float, help="smpo: scale of the pairs' weights")
    add("--alpha", type=float,
        help="dmpo: the share of preferences that are to stay the other way round")
    add("--beta", type=float,
        help="how strongly the policy is held to the reference, per mean squared error; a larger "
             "one moves less (mapo: the weight of the margin; dspo: of the pull off the reference; "
             "there a larger one moves more)")
    add("--inversion-spacing", choices=INVERSION_STEPS,
        help="inversion: the path: the paper's, by the cells of a uniform grid; or ours, even in "
             "log sigma, with the same number of UNet calls for every t")
    add("--inversion-steps", type=int, metavar="N",
        help="inversion: cells of the uniform grid over all timesteps, which they must divide "
             f"({INVERSION_STEPS['uniform']} if not given); or UNet calls of the log-sigma path "
             f"({INVERSION_STEPS['log-sigma']})")
    add("--eta", type=float,
        help="inversion: noise injected while inverting, from 0 (none) to 1 (DDPM's)")
    add("--inverter", choices=("policy", "reference"), help="inversion: the model that inverts")
    add("--liked-share", type=float, metavar="P",
        help="kto: weight of the liked images, 0 to 1; the disliked ones have the rest")
    add("--strata", type=int, metavar="N",
        help="noise: cells of the timesteps; all pairs of a micro-step draw theirs in one cell "
             "(for inversion these are the path's)")

    add = parser.add_argument_group("adapters (the reference is the UNet without them)")
    add = add.add_argument
    add("--lora-rank", type=int, default=0, metavar="R", help="rank of the adapters; 0: none")
    add("--lora-alpha", type=float, metavar="A",
        help="the adapters are scaled by A/R (if not given: A = R)")
    add("--lora-targets", choices=("attention", "all"), default="attention",
        help="layers with adapters: the attention's, or the feed-forward's too")
    add("--lora", metavar="PATH", help="LoRA to start from (file, folder or hub id)")
    add("--lora-start", choices=("continue", "merge"), default="continue",
        help="continue: train its adapters on, the reference is the model without them; merge: "
             "add it to the weights first, it is part of the reference, too")
    add("--base-weights", choices=("int8", "nf4"),
        help="keep the linear layers under the adapters in 8 or 4 bits, for small cards; of policy "
             "and reference alike (nf4 takes the library bitsandbytes)")

    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=int, metavar="N", help="optimizer steps")
    add("--batch", type=int, metavar="PAIRS", help="pairs per optimizer step, over all ranks")
    add("--micro-batch", type=int, metavar="PAIRS",
        help="pairs per rank and forward; the rest of the batch is accumulated")
    add("--lr", type=float, help="learning rate of AdamW, constant after the warm-up")
    add("--warmup", type=int, metavar="N", help="optimizer steps of linear warm-up")
    add("--compile", action="store_true",
        help="torch.compile both UNets: minutes at the start for faster steps, on a GPU; not with "
             "ZeRO-3")
    add("--seed", type=int, default=0, help="of everything random")
    add("--ds-config", metavar="FILE", default="ds_config.json",
        help="DeepSpeed's: ZeRO stage, precision, weight decay, clipping, monitors")

    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="FOLDER",
        help="the run's folder (if not given: out/MODEL-METHOD, of --recipe lora with -lora)")
    add("--checkpoint-every", type=int, metavar="N",
        help="optimizer steps between checkpoints; 0: none")
    add("--export-every", type=int, metavar="N", default=0,
        help="optimizer steps between UNets (or LoRAs) written to unets/, for evaluate.py; 0: none")
    add("--sample-every", type=int, metavar="N",
        help="optimizer steps between sample pictures; 0: none")
    add("--keep", type=int, default=2, metavar="N", help="newest checkpoints to keep")
    add("--keep-every", type=int, default=0, metavar="N",
        help="keep the checkpoints of every N optimizer steps as well; 0: no")
    add("--judge", type=own.choice(*TITLES, "held-out", "none"), metavar="SCORER",
        help=f"scorer of the sample pictures: {', '.join(TITLES)}, or FILE.py:FUNCTION "
             "(docs/judges.md); held-out: the loss on those pairs; none; the model that it likes "
             "best is kept in best/ (if not given: preference for --data toy, else none)")
    add("--scorer-folder", metavar="FOLDER", type=Path,
        help="folder with copies of the scorer's hub repositories, as owner/name")
    add("--sample-prompts", metavar="FILE",
        help="of the pictures: a .txt file, a prompt a line (if not given: captions of the data, "
             "held-out ones where there are any)")
    add("--guidance", type=float, metavar="W",
        help="scale of classifier-free guidance of the sample pictures")
    add("--dry-run", action="store_true", help="print the plan, check every input, and stop")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    # fmt: on

    cross = known.latents, known.objective
    parser.set_defaults(**recipe_of(known.model, known.method, known.recipe, *cross))
    if known.lora and known.lora_start == "continue":  # it has a rank of its own
        parser.set_defaults(lora_rank=0)
    if known.inversion_spacing in INVERSION_STEPS:
        parser.set_defaults(inversion_steps=INVERSION_STEPS[known.inversion_spacing])
    args = parser.parse_args(argv)
    words = [short_name(args.model), args.method, *crossed(args)]
    name = "-".join([*words, "lora"] if args.recipe == "lora" else words)
    args.out = Path(args.out or f"out/{name}")
    args.judge = args.judge or ("preference" if args.data == "toy" else "none")
    args.judge = None if args.judge == "none" else args.judge
    if args.lora_alpha is None:
        args.lora_alpha = float(args.lora_rank)
    return args


def share_or_source(text: str) -> float | str:
    """Of --held-out: a number from 0 up to 1, else the name of pairs."""
    try:
        share = float(text)
    except ValueError:
        return text
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(
            f"a share must lie between 0 and 1, and '{text}' does not."
        )
    return share


RANGES = {
    "beta": (1e-9, 1e9), "eta": (0, 1), "caption_dropout": (0, 1), "lr": (1e-12, 1),
    "steps": (1, 10**9), "batch": (1, 10**9), "micro_batch": (1, 10**9), "warmup": (0, 10**9),
    "inversion_steps": (1, 1000), "workers": (0, 1024), "seed": (0, 2**32),
    "resolution": (1, 8192), "max_broken": (0, 1), "buckets": (0, 10**9), "stream": (0, 10**6),
    "sample_every": (0, 10**9), "checkpoint_every": (0, 10**9), "export_every": (0, 10**9),
    "safe_loser": (0, 1), "gamma": (1e-9, 1e9), "alpha": (1e-6, 1 - 1e-6),
    "liked_share": (0, 1), "strata": (1, 1000), "lora_rank": (0, 4096), "lora_alpha": (0, 1e6),
    "keep": (1, 10**9), "keep_every": (0, 10**9), "guidance": (1, 1e6),
}  # fmt: skip


def check_flags(args: argparse.Namespace):
    """Raises UserError for flags that are out of range, or have no meaning together."""
    check_pairs(args.data)
    if isinstance(args.held_out, str):
        check_pairs(args.held_out)
    if args.judge == "held-out" and not args.held_out:
        raise UserError("--judge held-out: no pairs are held out; give --held-out, such as 0.02.")
    for path in filter(None, (args.model, args.unet, args.vae, args.lora)):
        check_local(path)
    say(args.model, args)
    cross = args.latents, args.objective
    for flag, default in recipe_of(args.model, args.method, "published", *cross).items():
        if default is None and flag != "vae" and getattr(args, flag) is not None:
            name = flag.replace("_", "-")
            raise UserError(
                f"--{name}: has no meaning for --method {args.method} with latents by "
                f"{args.latents} and the objective {args.objective}; leave it out."
            )
    for flag, (low, high) in RANGES.items():
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} {value}: must lie between {low} and {high}.")
    objective = OBJECTIVES[args.objective]
    if args.safe_loser is not None and not objective.pairwise:
        raise UserError(
            f"--safe-loser: has no meaning for the objective {args.objective}; leave it out."
        )
    if args.inverter == "reference" and not objective.reference:
        raise UserError(
            f"--inverter reference: the objective {args.objective} has no reference; leave it out."
        )
    if args.held_out and not objective.errors_alone:
        raise UserError(
            f"--held-out: the objective {args.objective} needs more of a pair than its errors, "
            "which are all that is kept of held-out pairs; leave it out."
        )
    if args.inversion_spacing == "log-sigma" and args.inversion_steps < 2:
        raise UserError("--inversion-steps 1: --inversion-spacing log-sigma takes at least 2.")
    if args.cache_latents and args.crop == "random":
        raise UserError(
            "--cache-latents: keeps one crop of each picture; leave it out, or give --crop center."
        )
    for flag, given in (("buckets", args.buckets), ("true-sizes", args.true_sizes)):
        if given and args.cache_latents:
            raise UserError(
                f"--{flag}: has no meaning with --cache-latents, which keeps squares and no sizes; "
                "leave one of them out."
            )
    if args.buckets and args.stream:
        raise UserError("--stream: has an order of its own; leave it out, or --buckets.")
    if args.buckets and args.compile:
        raise UserError(
            "--buckets: with --compile each (height, width) would be compiled anew, and more of "
            "them than torch keeps; leave one of them out."
        )
    continued = args.lora and args.lora_start == "continue"
    if args.base_weights and not (args.lora_rank or continued):
        raise UserError(
            f"--base-weights {args.base_weights}: has a meaning for adapters alone, whose base is "
            "frozen; give --lora-rank 64, or leave it out."
        )
    if args.base_weights and args.compile:
        raise UserError(
            f"--base-weights {args.base_weights}: was not tried with --compile; leave one of them "
            "out."
        )
    if continued and args.lora_rank:
        raise UserError(
            f"--lora-rank {args.lora_rank}: {args.lora} has its own rank; leave the flag out, or "
            "give --lora-start merge."
        )
