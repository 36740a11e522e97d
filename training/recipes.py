"""Recipes: the published ones for SDXL and SD1.5, and one for two CPU cores."""

from typing import Any

from system.hub import PICKAPIC, PRESETS, architecture

# A flag that is None has no meaning for the method (but --vae: the pipeline's own). The tiny
# numbers of the baselines are tuned like InPO's, see docs/tune.md.
RECIPES = {  # of InPO, flag:     SDXL         SD1.5      tiny
    "vae": ("madebyollin/sdxl-vae-fp16-fix", None, None),
    "data": (PICKAPIC, PICKAPIC, "toy"),
    "caption_dropout": (0.2, 0.2, 0.2),
    "beta": (5000.0, 2000.0, 1000.0),
    "inversion_spacing": ("uniform", "uniform", "uniform"),
    "inversion_steps": (10, 10, 10),
    "eta": (0.1, 0.1, 0.1),
    "inverter": ("policy", "policy", "policy"),
    "liked_share": (None, None, None),
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
NOISE |= {"strata": (1, 1, 1), "inversion_spacing": (None,) * 3}
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
        "beta": (None, None, None),
        "steps": (2000, 2000, 60),
        "batch": (2048, 2048, 16),
        "lr": (2.048e-5, 2.048e-5, 5e-6),
        "warmup": (200, 500, 10),
    },
}  # fmt: skip
# Of each --inversion-spacing, where --inversion-steps is not given; see docs/inversion.md.
INVERSION_STEPS = {"uniform": 10, "log-sigma": 3, "released": 10}
METHODS, COLUMNS = ("inpo", *BASELINES), ("sdxl", "sd15", "tiny")


def recipe_of(name: str, method: str = "inpo") -> dict[str, Any]:
    """The recipe of a preset, or of the architecture of a folder or hub id (with its own VAE)."""
    name = next((preset for preset in COLUMNS if PRESETS[preset] == name), name)
    if name in COLUMNS:
        recipe = RECIPES | BASELINES.get(method, {})
        return {flag: values[COLUMNS.index(name)] for flag, values in recipe.items()}
    return recipe_of(architecture(name), method) | {"vae": None}


def recipe_table() -> str:
    """RECIPES as aligned text, for --help."""
    rows = [("defaults of --model", *COLUMNS)]
    rows += [("start, reference", PRESETS["sdxl"], PRESETS["sd15"], "assets/tiny-sdxl")]
    rows += [("  in the paper", "the same", "its SFT on the winners (give --unet)", "")]
    for method in METHODS:
        rows += [("", "", "", ""), (f"--method {method}", "", "", "")]
        for flag, values in BASELINES.get(method, RECIPES).items():
            if any(value is not None for value in values):
                rows += [(f"--{flag.replace('_', '-')}", *map(str, values))]
    lines = ["  {:26}{:43}{:49}{}".format(*row).rstrip() for row in rows]
    return "\n".join([*lines, "  (what a baseline does not list is as in InPO)"])
