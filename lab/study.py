"""Studies in miniature: train many variants of the tiny model, measure them on the way, compare.

    python study.py table       # SFT, DPO, KTO and InPO, three seeds each      (make table)
    python study.py tune        # the settings that were tried for each method  (make tune)
    python study.py ablation    # what the parts of InPO do                     (make ablation)

The same command again continues, runs that are done are kept. A variant is a line of train_inpo.py;
in `table` and `tune` all take the same number of UNet calls (as training/budget.py counts them), in
`ablation` the same number of optimizer steps. On the way each is judged, on captions that alignment
never saw, against the model that it started from:

    preference      the toy's hidden preference, whose pairs it was trained on; exact (toy.py)
    faithfulness    share of images with the colour and the shape of the caption; exact
    drift           mean squared difference of predicted noise, on held-out drawings, all timesteps

Any method wins more by moving further. Compare them where they have moved equally far.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import model
import toy
from evaluation import figures
from invert import add_noise, randn_like
from lab import report
from system import hub
from system.files import ROOT, UserError
from system.program import HelpFormatter
from training import budget
from training.flags import parse
from training.folder import read_metrics
from training.recipes import recipe_of

CORES = len(os.sched_getaffinity(0))
STEPS, GUIDANCE = 15, 2.0  # of sampling

# -------------------------------------------------------------------------------------------------
# What is run.


@dataclass(frozen=True)
class Variant:
    """A line of train_inpo.py --model tiny, and the steps at which it is judged."""

    name: str
    flags: str  # beside --model, --seed, --steps and --out
    judged: tuple[int, ...]  # after these optimizer steps, the last of which ends the run
    group: str = ""  # heading in the report

    @property
    def steps(self) -> int:
        return self.judged[-1]

    @property
    def method(self) -> str:
        words = self.flags.split()
        return words[words.index("--method") + 1] if "--method" in words else "inpo"


@dataclass(frozen=True)
class Study:
    variants: list[Variant]
    seeds: list[int]  # of training
    images: int  # drawn per prompt at each judgement


# Steps of 16 pairs that cost about as many UNet calls as 60 of InPO: 60 x 19, 142 x 8, 380 x 3.
EQUAL = {"inpo": 60, "dpo": 142, "kto": 142, "sft": 380}
NAMES = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "inpo": "InPO"}


def table_study() -> Study:
    """Judged early, too: within the first steps each method leaves the base by its own way."""
    judged = {"inpo": (2, 4, 6, *range(10, 60, 10)), "sft": (10, 20, 40, *range(60, 380, 60))}
    judged["dpo"] = judged["kto"] = (5, 10, *range(20, 142, 20))
    variants = [Variant(NAMES[m], f"--method {m}", (*judged[m], EQUAL[m])) for m in NAMES]
    return Study(variants, [0, 1, 2], images=8)


def tune_study() -> Study:
    """Six settings for each method, ten for DPO, on a seed that no other study has."""
    variants = []
    for method in reversed(NAMES):
        rates, betas = ("5e-6", "1e-5", "2e-5"), (" --beta 1000", " --beta 5000")
        if method == "sft":
            rates, betas = ("2e-6", "5e-6", "1e-5", "2e-5", "4e-5", "1e-4"), ("",)
        if method == "dpo":  # its best of the first six was at the edge, and of the first eight
            rates = ("1e-6", "2e-6", *rates)
        for rate in rates:
            for beta in betas:
                name = f"{NAMES[method]}, lr {rate}" + beta.replace(" --", ", ")
                flags = f"--method {method} --lr {rate}{beta}"
                judged = EQUAL[method] // 2, EQUAL[method]
                variants.append(Variant(name, flags, judged, NAMES[method]))
    return Study(variants, [100], images=4)


def ablation_study() -> Study:
    """InPO's recipe with one thing changed at a time, 60 steps each."""
    recipe = recipe_of("tiny", "inpo")
    same = " ".join(f"--{flag} {recipe[flag]}" for flag in ("lr", "beta", "warmup", "batch"))
    variants = [("", "recipe", "--method inpo")]
    heading = "Inversion or random noise"
    variants += [(heading, "random noise", f"--method dpo --strata 10 {same}")]
    heading = "Inversion steps"
    variants += [(heading, f"{n} steps", f"--inversion-steps {n}") for n in (2, 5, 20)]
    heading = "Noise injected while inverting"
    variants += [(heading, f"eta {eta}", f"--eta {eta}") for eta in (0, 0.5, 1)]
    heading = "Beta"
    variants += [(heading, f"beta {beta}", f"--beta {beta}") for beta in (100, 300, 3000, 10000)]
    heading = "The model that inverts"
    variants += [(heading, "the reference inverts", "--inverter reference")]
    judged = 4, 6, 10, 20, 40, 60
    return Study([Variant(n, flags, judged, group) for group, n, flags in variants], [0, 1], 4)


STUDIES = {"table": table_study, "tune": tune_study, "ablation": ablation_study}

# -------------------------------------------------------------------------------------------------
# Judging one run's folder: each exported UNet, once.


def held_out(pipeline, count: int = 72) -> tuple[torch.Tensor, dict, torch.Tensor, torch.Tensor]:
    """(xt, cond, t, abar) of held-out drawings with forward noise, t evenly spaced over 0..999 in
    random order; the same in every process. xt: (B, C, h, w), t: (B,), abar: (T,), B = count."""
    captions = (toy.prompts("heldout") * count)[:count]
    rng, noise = np.random.default_rng(7), torch.Generator().manual_seed(7)
    pixels = np.stack([np.asarray(toy.draw(caption, rng), np.float32) for caption in captions])
    pixels = torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2)
    seeds = [torch.Generator().manual_seed(k) for k in range(count)]
    x0 = model.encode_images(pipeline, pixels, seeds)
    t = (torch.arange(count) * 1000 // count)[torch.randperm(count, generator=noise)]
    abar = model.alphas_cumprod(pipeline)
    xt = add_noise(x0, randn_like(x0, noise), abar[t])
    return xt, model.encode_prompts(pipeline, captions, toy.SIZE), t, abar


@torch.no_grad()
def judge(pipeline, unet, images: int, folder: Path | None = None) -> dict:
    """Scores of a UNet put into the pipeline, image k of prompt k mod P from seed k; the drift from
    the pipeline's own UNet. The first image of each prompt is kept in folder."""
    prompts = toy.prompts("heldout")
    xt, cond, t, abar = held_out(pipeline)
    both = [model.predict_noise(u, xt, t, cond, abar) for u in (pipeline.unet, unet)]
    base = pipeline.unet
    pipeline.register_modules(unet=unet)
    texts = prompts * images
    drawn = model.sample(pipeline, texts, list(range(len(texts))), STEPS, GUIDANCE)
    pipeline.register_modules(unet=base)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(len(prompts)):
            drawn[k].save(folder / f"{k:05d}.png")
    return {
        "preference": [round(toy.preference(image), 6) for image in drawn],
        "faithfulness": [toy.faithfulness(*pair) for pair in zip(drawn, texts, strict=True)],
        "drift": (both[1] - both[0]).square().mean().item(),
    }


def measure(folder: Path, images: int, steps: list[int] | None = None):
    """Write folder/measured.json, {images, steps: {step: judge(...)}}, for the UNets of these steps
    in unets/, or of all; where there is none, for the start, as step 0."""
    file = folder / "measured.json"
    measured = json.loads(file.read_text()) if file.exists() else {}
    if measured.get("images") != images:
        measured = {"images": images, "steps": {}}
    pipeline = model.load_pipeline("tiny")
    exports = {str(int(path.name[5:])): path for path in sorted(folder.glob("unets/step_*"))}
    for step, path in (exports or {"0": hub.PRESETS["tiny"]}).items():
        if step not in measured["steps"] and (steps is None or int(step) in steps):
            kept = folder / "images" / f"step_{int(step):06d}"
            measured["steps"][step] = judge(pipeline, model.load_unet(str(path)), images, kept)
            scratch = file.with_suffix(".new")
            scratch.write_text(json.dumps(measured))
            scratch.replace(file)


# -------------------------------------------------------------------------------------------------
# Running them: each in its own process, as many at a time as there are cores.


@dataclass(frozen=True)
class Job:
    variant: Variant | None  # None: the base, which is only judged
    seed: int
    images: int
    folder: Path

    def calls_per_step(self) -> float:
        asked = parse("", self.commands()[0][1:])
        cells = range(asked.inversion_steps or asked.strata)
        return budget.unet_calls(asked.method, asked.batch, cells)

    def judged(self) -> tuple[int, ...]:
        return self.variant.judged if self.variant else (0,)

    def judging(self) -> int:
        """UNet calls of one judgement."""
        return self.images * len(toy.prompts("heldout")) * STEPS * 2

    def calls(self) -> float:
        """UNet calls in all, the unit of the progress bar."""
        return self.spent(self.judged()[-1], len(self.judged()))

    def done(self) -> float:
        trained, judged = len(read_metrics(self.folder)), 0
        file = self.folder / "measured.json"
        if file.exists():
            measured = json.loads(file.read_text())
            if measured["images"] == self.images:
                judged = len({int(step) for step in measured["steps"]}.intersection(self.judged()))
        return self.spent(trained, judged)

    def spent(self, steps: int, judgements: int) -> float:
        return (self.calls_per_step() * steps if steps else 0) + judgements * self.judging()

    def commands(self) -> list[list[str]]:
        judge = ["-m", "lab.study", "measure", str(self.folder), "--images", str(self.images)]
        judge += ["--steps", *map(str, self.judged())]
        if self.variant is None:
            return [judge]
        every = math.gcd(*self.variant.judged[:-1]) or self.variant.steps  # after the last, too
        train = [str(ROOT / "train_inpo.py"), "--model", "tiny", *self.variant.flags.split()]
        train += ["--seed", str(self.seed), "--steps", str(self.variant.steps)]
        train += ["--export-every", str(every), "--sample-every", "0"]
        return [[*train, "--out", str(self.folder)], judge]


def jobs_of(study: Study, out: Path) -> list[Job]:
    def folder(variant, seed):
        words = f"{variant.name} seed {seed}".lower().replace(",", "").split()
        return out / "runs" / "-".join(words)

    trained = [
        Job(variant, seed, study.images, folder(variant, seed))
        for seed in study.seeds
        for variant in study.variants
    ]
    return [Job(None, 0, study.images, out / "runs" / f"base-{study.images}"), *trained]


children: set[subprocess.Popen] = set()  # commands under way, ended with this process


def run_job(job: Job, threads: int):
    """Train and judge; raises UserError with the log's last line where a command fails."""
    if job.done() >= job.calls():
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    log = job.folder.with_suffix(".log")
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    for words in job.commands():
        with open(log, "a") as file:
            command = [sys.executable, *words]
            child = subprocess.Popen(command, stdout=file, stderr=file, env=env)
            children.add(child)
            code = child.wait()
            children.remove(child)
        if code:
            last = (log.read_text().strip().splitlines() or ["nothing was printed"])[-1]
            raise UserError(f"{' '.join(words)} failed: {last} (see {log}).")


def run_all(jobs: list[Job], at_once: int):
    """All jobs, with a progress bar in UNet calls. Where one fails, or on Ctrl-C or SIGTERM, those
    under way are stopped; they continue from their last checkpoint when run again."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threads, total = max(1, CORES // at_once), sum(job.calls() for job in jobs)
    start = round(sum(job.done() for job in jobs))
    bar = tqdm(total=round(total), initial=start, unit="call", unit_scale=True, desc="UNet calls")
    with bar, ThreadPoolExecutor(at_once) as pool:
        running = [pool.submit(run_job, job, threads) for job in jobs]
        try:
            while not all(future.done() for future in running):
                time.sleep(2)
                bar.set_postfix(runs=f"{sum(f.done() for f in running)} of {len(running)}")
                bar.update(round(sum(job.done() for job in jobs)) - bar.n)
                failed = [f for f in running if f.done() and f.exception()]
                if failed:
                    raise failed[0].exception()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.terminate()
            raise


def records(study: Study, jobs: list[Job]) -> list[dict]:
    """One entry per judgement: variant, seed, step, UNet calls so far, and its scores; the base has
    variant "base"."""
    found = []
    for job in jobs:
        measured = json.loads((job.folder / "measured.json").read_text())["steps"]
        for step in job.judged():
            name = job.variant.name if job.variant else "base"
            calls = step * job.calls_per_step() if job.variant else 0
            entry = {"variant": name, "seed": job.seed, "step": step, "calls": calls}
            found.append(entry | measured[str(step)])
    return found


# -------------------------------------------------------------------------------------------------
# What is written: NAME.md (tables), NAME.json (win rates), judgements.json, pictures.


TRADE = [("drift", "preference"), ("preference", "faithfulness")]  # what is gained, and its price


def write_table(results: report.Results, jobs: list[Job], out: Path) -> str:
    columns = {"after 60 steps": 60, "at equal compute": -1}
    costs = {name: [] for name in results.variants}
    shown = {"base": jobs[0].folder / "images" / "step_000000"}
    for job in jobs[1:]:
        costs[job.variant.name].append(json.loads((job.folder / "cost.json").read_text()))
        if job.seed == results.seeds[0]:
            last = f"step_{job.variant.steps:06d}"
            shown[job.variant.name] = job.folder / "images" / last
    axes = [("step", "wins"), ("step", "preference"), ("calls", "wins"), ("calls", "preference")]
    panels = report.panels(results, results.variants, axes + TRADE)
    figures.trajectories(panels, out / "table.png", "The tiny model, three training seeds a method")
    report.samples(shown, toy.prompts("heldout"), out / "samples.png")
    parts = {
        "Wins on the hidden preference": report.wins_table(results, columns),
        "Scores after 60 steps": report.scores_table(results, 60),
        "Scores at equal compute": report.scores_table(results),
        "Where all have moved equally far": report.matched_table(results, results.variants),
        "Training cost, at equal compute": report.cost_table(costs),
    }
    return "\n".join(f"## {heading}\n\n{part}" for heading, part in parts.items())


def write_groups(results: report.Results, jobs: list[Job], out: Path, common: list[str]) -> str:
    """A table and panels for each group of variants, each with the common ones before its own; with
    common ones also what is left where all have moved equally far."""
    groups, panels, text = {}, [], ""
    for job in jobs[1:]:
        if job.variant.group and job.seed == results.seeds[0]:
            groups.setdefault(job.variant.group, list(common)).append(job.variant.name)
    for heading, names in groups.items():
        for panel in report.panels(results, names, TRADE):
            panels.append(panel | {"title": heading})
        text += f"## {heading}\n\n{report.scores_table(results, -1, names)}\n"
        if common:  # among variants of one recipe
            text += f"{report.matched_table(results, names)}\n"
    title = f"Variants of the tiny model, training seeds {', '.join(map(str, results.seeds))}"
    figures.trajectories(panels, out.with_suffix(".png"), title)
    return text


def write_tune(results: report.Results, jobs: list[Job], out: Path) -> str:
    return write_groups(results, jobs, out / "tune", [])


def write_ablation(results: report.Results, jobs: list[Job], out: Path) -> str:
    return write_groups(results, jobs, out / "ablation", ["recipe"])


WRITERS = {"table": write_table, "tune": write_tune, "ablation": write_ablation}

# -------------------------------------------------------------------------------------------------
# The command line.


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in STUDIES:
        add = commands.add_parser(name, formatter_class=HelpFormatter).add_argument
        add("--out", type=Path, default=Path("out", name), help="folder of runs and results")
        add("--jobs", type=int, default=CORES, help="runs at a time")
    add = commands.add_parser("measure", formatter_class=HelpFormatter).add_argument
    add("folder", type=Path, help="a run of train_inpo.py with --export-every")
    add("--images", type=int, default=8, help="per prompt")
    add("--steps", type=int, nargs="+", help="exports to judge (default: all)")
    args = parser.parse_args(argv)
    if min(vars(args).get("jobs", 1), vars(args).get("images", 1)) < 1:
        parser.error("--jobs and --images must be at least 1.")
    if args.command == "measure":
        if args.steps != [0] and not any(args.folder.glob("unets/step_*")):
            parser.error(f"{args.folder} has no unets/step_*; train with --export-every.")
        return measure(args.folder, args.images, args.steps)
    study = STUDIES[args.command]()
    jobs = jobs_of(study, args.out)
    try:
        run_all(jobs, args.jobs)
    except UserError as error:
        parser.exit(2, f"study.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstudy.py: stopped; the same command continues.\n")
    prompts = toy.prompts("heldout") * study.images
    found = records(study, jobs)
    results = report.Results(found, prompts)
    text = WRITERS[args.command](results, jobs, args.out)
    (args.out / "judgements.json").write_text(json.dumps(found))
    (args.out / f"{args.command}.md").write_text(text)
    wins = report.all_wins(results)
    (args.out / f"{args.command}.json").write_text(json.dumps(wins, indent=1) + "\n")
    print(text)
    committed = ROOT / "docs" / f"{args.command}.json"
    if committed.exists():
        print(report.compare(wins, json.loads(committed.read_text()), f"docs/{committed.name}"))


if __name__ == "__main__":
    main()
