"""Recipes: the published ones for SDXL and SD1.5, one for two CPU cores, and adapters for a small
set on one card."""

from argparse import Namespace
from typing import Any

from system.hub import PICKAPIC, PRESETS, architecture
from training.methods import LATENTS, OBJECTIVES

# A flag that is None has no meaning for the method (but --vae: the pipeline's own). The tiny
# numbers of the baselines are tuned like InPO's, see docs/tune.md.
RECIPES = {  # of InPO, flag:     SDXL         SD1.5      tiny
    "vae": ("madebyollin/sdxl-vae-fp16-fix", None, None),
    "data": (PICKAPIC, PICKAPIC, "toy"),
    "caption_dropout": (0.2, 0.2, 0.2),
    "latents": ("inversion",) * 3,
    "objective": ("dpo",) * 3,
    "beta": (5000.0, 2000.0, 1000.0),
    "inversion_spacing": ("uniform", "uniform", "uniform"),
    "inversion_steps": (10, 10, 10),
    "eta": (0.1, 0.1, 0.1),
    "inverter": ("policy", "policy", "policy"),
    "liked_share": (None, None, None),
    "gamma": (None, None, None),
    "alpha": (None, None, None),
    "strata": (None, None, None),
    "steps": (400, 400, 60),
    "batch": (1024, 1024, 16),
    "micro_batch": (4, 16, 16),
    "lr": (1.024e-5, 1.024e-5, 2e-5),
    "warmup": (200, 200, 10),
    "gradient_checkpointing": (True, True, False),
    "workers": (8, 8, 0),
    "checkpoint_every": (50, 50, 20),
    "sample_every": (50, 50, 20),
    "guidance": (5.0, 7.5, 2.0),
}
NOISE = {"inversion_steps": (None,) * 3, "eta": (None,) * 3, "inverter": (None,) * 3}
NOISE |= {"strata": (1, 1, 1), "inversion_spacing": (None,) * 3, "latents": ("noise",) * 3}
BASELINES = {  # what differs from InPO's
    # SalesforceAIResearch/DiffusionDPO, launchers/sdxl.sh and sd15.sh; lr 1e-8 x 2048.
    "dpo": NOISE | {
        "beta": (5000.0, 5000.0, 1000.0),
        "steps": (2000, 2000, 60),
        "batch": (2048, 2048, 16),
        "lr": (2.048e-5, 2.048e-5, 2e-6),
        "warmup": (200, 500, 10),
    },
    # jacklishufan/diffusion-kto, exps/example.sh at ed36c54 and train_kto_sd_v1.5.py (beta): 4 GPUs
    # of 2 images, here 4 pairs; --use_8bit_adam, here AdamW. At 1c652b9 the launch file accumulates
    # 256 of these batches. There is no SDXL version: those numbers are SD1.5's.
    "kto": NOISE | {
        "objective": ("kto",) * 3,
        "beta": (1000.0, 1000.0, 1000.0),
        "liked_share": (0.8, 0.8, 0.8),
        "steps": (20_000, 20_000, 60),
        "batch": (4, 4, 16),
        "micro_batch": (1, 1, 16),
        "lr": (1e-7, 1e-7, 1e-5),
        "warmup": (200, 200, 10),
        "checkpoint_every": (1000, 1000, 20),
        "sample_every": (1000, 1000, 20),
    },
    # Diffusion-DPO's script has it as --sft, and no launch file: the numbers of its DPO.
    "sft": NOISE | {
        "objective": ("sft",) * 3,
        "beta": (None, None, None),
        "steps": (2000, 2000, 60),
        "batch": (2048, 2048, 16),
        "lr": (2.048e-5, 2.048e-5, 5e-6),
        "warmup": (200, 500, 10),
    },
    # Those below: docs/objectives.md has the source of each number, docs/tune.md of the tiny ones.
    # JaydenLyh/SmPO at 61105a1, examples/sdxl.sh and sd15.sh.
    "smpo": {
        "latents": ("renoise",) * 3,
        "objective": ("smpo",) * 3,
        "beta": (5000.0, 2000.0, 100.0),
        "inversion_spacing": (None,) * 3,
        "inversion_steps": (10, 5, 10),
        "eta": (0.0, 0.0, 0.0),
        "gamma": (10.0, 10.0, 10.0),
        "steps": (200, 200, 60),
        "warmup": (100, 100, 10),
    },
    # AIDC-AI/Diffusion-SDPO at 84fb241, scripts/train/sdxl_dmpo.sh and sd15_dmpo.sh, which train
    # with its safe loser (mu 0.6 and 0.9).
    "dmpo": NOISE | {
        "objective": ("dmpo",) * 3,
        "beta": (6000.0, 2000.0, 1000.0),
        "alpha": (0.01, 0.01, 0.01),
        "steps": (2000, 2000, 60),
        "batch": (2048, 2048, 16),
        "lr": (2.048e-6, 2.048e-5, 2e-6),
        "warmup": (500, 500, 10),
    },
    # mapo-t2i/mapo at 374b3d3, README.md's command and args.py. There is no SD1.5 version.
    "mapo": NOISE | {
        "objective": ("mapo",) * 3,
        "caption_dropout": (0.0, 0.0, 0.2),
        "beta": (0.1, 0.1, 0.1),
        "steps": (2000, 2000, 60),
        "batch": (16, 16, 16),
        "micro_batch": (2, 2, 16),
        "lr": (1e-5, 1e-5, 2e-5),
        "warmup": (0, 0, 10),
    },
    # huaishengzhu/DSPO at 8b4e09b, launchers/sdxl.sh and sd15.sh; beta is SD1.5's, since the SDXL
    # branch has another objective.
    "dspo": NOISE | {
        "objective": ("dspo",) * 3,
        "beta": (0.001, 0.001, 0.5),
        "steps": (2000, 2000, 60),
        "batch": (2048, 2048, 16),
        "lr": (2.048e-5, 2.048e-5, 2e-5),
        "warmup": (200, 500, 10),
    },
}  # fmt: skip
# --recipe lora: what differs from the method's recipe, for hundreds or thousands of pairs on one
# card. Nobody has tuned it on SDXL or SD1.5 yet; where there is a source, it is that one's number.
#   lora_rank, lora_targets   diffusers' train_diffusion_dpo.py and _sdxl.py, and MaPO's
#                             train_with_lora.py, as their READMEs launch them: rank 8, attention,
#                             alpha = rank. tiny: docs/results.md.
#   dpo                       theirs for SDXL: 2,000 steps of 16 pairs, lr 1e-5, no warm-up. (Their
#                             SD1.5 has 10,000 steps of 32 pairs: 64 epochs of 5,000.)
#   inpo                      half of these steps, since a pair takes 17 UNet calls in place of 6,
#                             at twice the lr: lr x steps bounds how far AdamW can move a weight.
#   sft                       lr of sd-scripts' sdxl_train_network.py, a denoising loss as well.
#   beta                      the method's own: theirs is 5000, too.
#   micro_batch               1: the least memory, and all ten cells of timesteps in every step.
#   gradient_checkpointing    SDXL takes 8.2 GiB with it, 17.1 without; SD1.5 3.5 GiB (computed).
#   ds_config                 ZeRO-1: on one card it has no buckets (docs/memory.md).
#   tiny                      ten times the lr of its weights.
LORA = {
    "inpo": {
        "lora_rank": (8, 8, 16),
        "lora_targets": ("attention", "attention", "all"),
        "steps": (1000, 1000, 60),
        "batch": (16, 16, 16),
        "micro_batch": (1, 1, 16),
        "lr": (2e-5, 2e-5, 2e-4),
        "warmup": (0, 0, 10),
        "gradient_checkpointing": (True, False, False),
        "workers": (4, 4, 0),
        "checkpoint_every": (100, 100, 20),
        "sample_every": (100, 100, 20),
        "ds_config": ("configs/zero1.json",) * 3,
    },
    "dpo": {"steps": (2000, 2000, 60), "lr": (1e-5, 1e-5, 2e-5)},
    "kto": {"steps": (2000, 2000, 60), "lr": (1e-5, 1e-5, 1e-4)},
    "sft": {"lr": (1e-4, 1e-4, 5e-5)},
    "smpo": {},
    "dmpo": {"steps": (2000, 2000, 60), "lr": (1e-5, 1e-5, 2e-5)},
    "mapo": {"steps": (2000, 2000, 60), "lr": (1e-5, 1e-5, 2e-4)},
    "dspo": {"lr": (1e-4, 1e-4, 2e-4)},
}
# Of each --inversion-spacing, where --inversion-steps is not given; see docs/inversion.md.
INVERSION_STEPS = {"uniform": 10, "log-sigma": 4}
METHODS, COLUMNS = ("inpo", *BASELINES), ("sdxl", "sd15", "tiny")
TITLES = {"inpo": "InPO", "dpo": "Diffusion-DPO", "kto": "Diffusion-KTO", "sft": "SFT"}
TITLES |= {"smpo": "SmPO", "dmpo": "DMPO", "mapo": "MaPO", "dspo": "DSPO"}
NAMES = ("published", "lora")


def recipe_of(
    name: str,
    method: str = "inpo",
    recipe: str = "published",
    latents: str | None = None,
    objective: str | None = None,
) -> dict[str, Any]:
    """The recipe of a preset, or of the architecture of a folder or hub id (with its own VAE).

    Latents and objective that are not the method's own bring the flags that are theirs alone, with
    the values of the method whose own they are; those of the method's own have no meaning then."""
    name = next((preset for preset in COLUMNS if PRESETS[preset] == name), name)
    if name not in COLUMNS:
        own = {"vae": None}
        return recipe_of(architecture(name), method, recipe, latents, objective) | own
    table = RECIPES | BASELINES.get(method, {})
    if recipe == "lora":
        table |= LORA["inpo"] | LORA[method]
    for key, rows, asked in (("latents", LATENTS, latents), ("objective", OBJECTIVES, objective)):
        if asked and asked != table[key][0]:
            theirs = RECIPES | BASELINES.get(rows[asked].method, {})
            absent = dict.fromkeys(rows[table[key][0]].flags, (None,) * 3)
            table |= absent | {flag: theirs[flag] for flag in rows[asked].flags}
            table[key] = (asked,) * 3
    return {flag: values[COLUMNS.index(name)] for flag, values in table.items()}


def crossed(args: Namespace) -> list[str]:
    """What of latents and objective is not the method's own."""
    table = RECIPES | BASELINES.get(args.method, {})
    return [vars(args)[key] for key in ("latents", "objective") if vars(args)[key] != table[key][0]]


def recipe_table() -> str:
    """RECIPES as aligned text, for --help."""
    rows = [("defaults of --model", *COLUMNS)]
    rows += [("start, reference", PRESETS["sdxl"], PRESETS["sd15"], "assets/tiny-sdxl")]
    rows += [("  in the paper", "the same", "its SFT on the winners (give --unet)", "")]
    tables = [(f"--method {method}", BASELINES.get(method, RECIPES)) for method in METHODS]
    tables += [
        (f"--recipe lora{f' --method {method}' if method != 'inpo' else ''}", LORA[method])
        for method in METHODS
    ]
    for title, table in tables:
        rows += [("", "", "", ""), (title, "", "", "")]
        for flag, values in table.items():
            if any(value is not None for value in values):
                rows += [(f"--{flag.replace('_', '-')}", *map(str, values))]
    lines = ["  {:26}{:43}{:49}{}".format(*row).rstrip() for row in rows]
    notes = "  (what a baseline does not list is as in InPO, and what --recipe lora does not list"
    return "\n".join([*lines, notes, "  as in the method's own recipe)"])
