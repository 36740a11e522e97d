"""The studies: which variants of the tiny model are trained, from which seeds, and when judged."""

from dataclasses import dataclass, replace
from functools import partial

from lab import tuning
from training.budget import unet_calls
from training.flags import parse
from training.latents import count_cells, inversion_calls
from training.recipes import recipe_of


@dataclass(frozen=True)
class Variant:
    """A line of train_inpo.py --model tiny, and the steps at which it is judged."""

    name: str
    flags: str  # besides --model, --seed, --steps and --out
    judged: tuple[int, ...]  # after these optimizer steps; the last one ends the run
    group: str = ""  # heading in the report
    equal: int = 0  # the step at equal compute, 0 where that is the last
    precision: str = "fp32"  # or bf16, fp16: of the UNets, see lab/half.py

    @property
    def steps(self) -> int:
        return self.judged[-1]

    @property
    def calls_per_step(self) -> float:
        return calls_per_step(self.flags)

    @property
    def method(self) -> str:
        words = self.flags.split()
        return words[words.index("--method") + 1] if "--method" in words else "inpo"


@dataclass(frozen=True)
class Study:
    variants: list[Variant]
    seeds: list[int]  # of training
    images: int  # drawn per prompt at each judgement
    fold: int = 0  # of the captions, which alignment never sees (toy.prompts)
    task: str = "clean"  # of toy.TASKS: the pairs, and the judge


def calls_per_step(flags: str) -> float:
    """UNet calls of an optimizer step, the mean over the timesteps."""
    args = parse("", ["--model", "tiny", *flags.split()])
    inverting = inversion_calls(args, range(count_cells(args)))
    return unet_calls(args.objective, args.batch, inverting)


def equal_steps(flags: str) -> int:
    """Steps that take as many UNet calls as 60 of InPO on the paper's path, as nearly as may be."""
    return round(60 * calls_per_step(PAPER) / calls_per_step(flags))


# The paper's path is named in the studies that rest on it, whatever the default may be.
PAPER = "--inversion-spacing uniform --inversion-steps 10"

# What the leaderboard compares: presets and crosses, by name. (flags, learning rates, betas): the
# settings that each is tuned with. Six at first, the rates around what a few steps of it could
# bear; while the best has the largest or the smallest rate, two more beyond it, at most ten in all.
RATES, BETAS = ("5e-6", "1e-5", "2e-5"), ("1000", "5000")
LOWER, HIGHER = ("1e-6", "2e-6", "5e-6"), ("1e-5", "2e-5", "4e-5")
COARSE = ("2e-6", "5e-6", "1e-5", "2e-5", "4e-5", "1e-4")
FINE = ("2e-7", "5e-7", "1e-6", "2e-6", "5e-6", "1e-5")
ENTRIES = {
    "InPO": (f"--method inpo {PAPER}", (*RATES, "4e-5"), BETAS),
    "DPO": ("--method dpo", (*LOWER, "1e-5", "2e-5"), BETAS),
    "KTO": ("--method kto", RATES, BETAS),
    "SFT": ("--method sft", COARSE, ()),
    "SmPO": ("--method smpo", HIGHER, ("100", "1000")),
    "DMPO": ("--method dmpo", LOWER, BETAS),
    "MaPO": ("--method mapo", ("2e-6", "5e-6", "1e-5", "2e-5"), ("0.02", "0.1")),
    "DSPO": ("--method dspo", (*RATES, "4e-5"), ("0.001", "0.5")),
    "InPO, released latents": ("--method inpo --latents released", (*RATES, "4e-5", "8e-5"), BETAS),
    "InPO, log sigma": ("--method inpo --inversion-spacing log-sigma", RATES, BETAS),
    "InPO, renoise": ("--method inpo --latents renoise", HIGHER, BETAS),
    "KTO, inverted": ("--method kto --latents inversion", ("1e-6", "2e-6", *RATES), BETAS),
    "KTO, inverted, even": (
        "--method kto --latents inversion --liked-share 0.5",
        (*RATES, "4e-5"),
        BETAS,
    ),
    "SFT, inverted": ("--method sft --latents inversion", FINE, ()),
    "DPO, safe loser": ("--method dpo --safe-loser 0.6", ("2e-6", *RATES, "4e-5"), BETAS),
}


def tune_study() -> Study:
    """The settings of each, at equal compute, on a seed that no other study has."""
    variants = []
    for group, (flags, rates, betas) in ENTRIES.items():
        for rate in rates:
            for beta in betas or [""]:
                more = f" --lr {rate}" + (f" --beta {beta}" if beta else "")
                name = group + more.replace(" --", ", ")
                judged = (equal_steps(flags),)
                variants.append(Variant(name, flags + more, judged, group))
    return Study(variants, [100], images=4)


# Steps at which entries are judged that have so many at equal compute. Of all but the last there
# are few multiples of their common divisor, which is what a run exports.
JUDGED = {
    38: (4, 8, 16, 38, 60),
    55: (5, 15, 25, 55, 60),
    60: (4, 12, 24, 60),
    71: (5, 15, 30, 60, 71),
    134: (10, 30, 60, 134),
    142: (10, 30, 60, 142),
    190: (10, 30, 60, 190),
    380: (20, 60, 160, 380),
}
EARLY = "DSPO", "DPO, safe loser"  # also after 5: their 10 go farther than others go in all
PRESETS = "InPO", "DPO", "KTO", "SFT", "SmPO", "MaPO", "DMPO", "DSPO"
ON_TASKS = "InPO", "DPO", "KTO", "SFT", "SmPO", "MaPO", "KTO, inverted, even", "DPO, safe loser"


def entry(name: str) -> Variant:
    """An entry of the leaderboard at the setting that docs/settings.json has chosen."""
    flags = tuning.flags_of(name)
    equal = equal_steps(flags)
    judged = (5, *JUDGED[equal]) if name in EARLY else JUDGED[equal]
    group = "Methods" if name in PRESETS else "Crosses"
    return Variant(name, flags, judged, group, equal)


def leaderboard_study() -> Study:
    """Every entry that any setting has made better than the base, judged early as well: each leaves
    the base in a way of its own."""
    names = [name for name in ENTRIES if tuning.gains(tuning.read(), name)]
    return Study([entry(name) for name in names], [0, 1, 2], images=4)


def task_study(task: str) -> Study:
    """Eight entries on another task, at the settings that were chosen on the clean one."""
    judged = {60: (24, 60), 38: (16, 38, 60), 142: (60, 142), 190: (60, 190), 380: (60, 380)}
    variants = [entry(name) for name in ON_TASKS]
    variants = [replace(variant, judged=judged[variant.equal]) for variant in variants]
    return Study(variants, [0, 1, 2], images=4, task=task)


def precision_study() -> Study:
    """InPO's UNets in fp32, the leaderboard's run, and in what else this processor has kernels
    for; the others would take 15 times as long."""
    from torch.ops import mkldnn

    start = replace(entry("InPO"), judged=(60,))
    has = {"bf16": mkldnn._is_mkldnn_bf16_supported, "fp16": mkldnn._is_mkldnn_fp16_supported}
    halves = [replace(start, name=f"InPO, {p}", precision=p) for p, there in has.items() if there()]
    return Study([start, *halves], [0, 1, 2], images=4)


def ablation_study() -> Study:
    """InPO's recipe with one thing changed at a time, 60 steps each."""
    recipe = recipe_of("tiny", "inpo")
    same = " ".join(f"--{flag} {recipe[flag]}" for flag in ("lr", "beta", "warmup", "batch"))
    variants = [("", "recipe", PAPER)]
    heading = "Inversion or random noise"
    variants += [(heading, "random noise", f"--method dpo --strata 10 {same}")]
    heading = "Inversion steps"
    cells = PAPER.replace("10", "{}")
    variants += [(heading, f"{n} steps", cells.format(n)) for n in (2, 5, 20)]
    heading = "Noise injected while inverting"
    variants += [(heading, f"eta {eta}", f"{PAPER} --eta {eta}") for eta in (0, 0.5, 1)]
    heading = "Beta"
    betas = (100, 300, 3000, 10000)
    variants += [(heading, f"beta {beta}", f"{PAPER} --beta {beta}") for beta in betas]
    heading = "The model that inverts"
    variants += [(heading, "the reference inverts", f"{PAPER} --inverter reference")]
    judged = 4, 6, 10, 20, 40, 60
    return Study([Variant(n, flags, judged, group) for group, n, flags in variants], [0, 1], 4)


def inversion_study() -> Study:
    """Paths of inversion and their UNet calls. All are judged after 60 steps, and at equal compute:
    where a step costs less the run goes on until it has cost as many UNet calls, 60 x 19."""

    def judged(calls_a_pair):  # in steps of 16 pairs; 5 % more is as near as 60 steps come
        last = round(60 * 19 / calls_a_pair)
        return (30, 60, last) if last > 63 else (30, 60)

    def variant(name, flags, calls, eta=""):  # calls: mean, to invert an image
        flags = flags if flags.startswith("--") else f"--inversion-spacing {flags}"
        flags += f" --eta {eta}" if eta else ""
        return Variant(name, flags, judged(2 * (calls + 4)), "eta 0" if eta == "0" else "eta 0.1")

    def log_sigma(steps, eta=""):
        name = f"log sigma, {steps} calls" + (f", eta {eta}" if eta else "")
        return variant(name, f"log-sigma --inversion-steps {steps}", steps, eta)

    ours = "log-sigma --inversion-steps 3"
    variants = [
        variant("uniform, 10 cells", "uniform --inversion-steps 10", 5.5),
        *(log_sigma(steps) for steps in (3, 4, 2, 6)),
        variant("uniform, 5 cells", "uniform --inversion-steps 5", 3),
        variant("uniform, 10 cells, eta 0", "uniform --inversion-steps 10", 5.5, "0"),
        *(log_sigma(steps, "0") for steps in (3, 4, 2, 6)),
        variant("released", "--latents released", 6.4),
        variant("log sigma, 3 calls, by the reference", f"{ours} --inverter reference", 3),
    ]
    return Study(variants, [10, 11, 12, 13, 14], images=8)


def drift_study() -> Study:
    """The first steps of some of inversion_study's variants, with three of its seeds."""
    names = "uniform, 10 cells", "released", "log sigma, 3 calls", "log sigma, 4 calls"
    every = {variant.name: variant for variant in inversion_study().variants}
    variants = [Variant(name, every[name].flags, (4, 8, 12, 20)) for name in names]
    return Study(variants, [10, 11, 12], images=4)


def confirm_study() -> Study:
    """The paper's path and the one that inversion_study has chosen, once."""
    paths = {"uniform, 10 cells": "uniform --inversion-steps 10"}
    paths["log sigma, 3 calls"] = "log-sigma --inversion-steps 3"
    variants = [Variant(n, f"--inversion-spacing {flags}", (60,)) for n, flags in paths.items()]
    return Study(variants, [20, 21, 22, 23, 24], images=8, fold=1)


def rates_study() -> Study:
    """The paper's path and two of log-sigma's, each at three learning rates. The rule of choice was
    written down before the runs: of each path the rate with the highest mean preference after 60
    steps among those whose faithfulness is at least 99 %."""
    paths = {"uniform, 10 cells": PAPER}
    for steps in (3, 4):
        paths[f"log sigma, {steps} calls"] = (
            f"--inversion-spacing log-sigma --inversion-steps {steps}"
        )
    variants = [
        Variant(f"{name}, lr {rate}", f"{flags} --lr {rate}", (30, 60), name)
        for rate in ("1e-5", "2e-5", "5e-6")
        for name, flags in paths.items()
    ]
    return Study(variants, [30, 31, 32, 33, 34], images=8)


def verdict_study() -> Study:
    """What the rule of rates_study has chosen, once. Ours becomes the tiny model's if its mean
    preference is above the paper's path's by more than chance, at no fewer wins over the base and
    no lower faithfulness."""
    chosen = (
        "uniform, 10 cells, lr 1e-5",
        "log sigma, 4 calls, lr 2e-5",
        "log sigma, 3 calls, lr 1e-5",
    )
    every = {variant.name: variant for variant in rates_study().variants}
    variants = [Variant(name, every[name].flags, (60,)) for name in chosen]
    return Study(variants, [40, 41, 42, 43, 44], images=8, fold=2)


STUDIES = {
    "leaderboard": leaderboard_study,
    "noisy": partial(task_study, "noisy"),
    "red": partial(task_study, "red"),
    "precision": precision_study,
    "tune": tune_study,
    "ablation": ablation_study,
    "inversion": inversion_study,
    "drift": drift_study,
    "confirm": confirm_study,
    "rates": rates_study,
    "verdict": verdict_study,
}
