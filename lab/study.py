"""Studies in miniature: train many variants of the tiny model, measure them on the way, compare.

    python -m lab.study table       # SFT, DPO, KTO and InPO, three seeds each      (make table)
    python -m lab.study tune        # the settings that were tried for each method  (make tune)
    python -m lab.study ablation    # what the parts of InPO do                     (make ablation)
    python -m lab.study inversion   # paths of inversion, five seeds
    python -m lab.study drift       # some of them early on, where all have moved equally far
    python -m lab.study confirm     # the chosen path, on seeds and captions not used before
    python -m lab.study rates       # three paths, each at three learning rates
    python -m lab.study verdict     # each at the rate that was chosen, on new seeds and captions

The same command continues a study; runs that are done are kept. A variant is a line of
train_inpo.py. In `table` and `tune` all variants take the same number of UNet calls
(training/budget.py), in `ablation` the same number of optimizer steps. lab/measure.py judges each
on the way, on captions that alignment never saw, against the model that it started from: by the
hidden preference, by faithfulness to the caption, and by drift, how far it has moved.

Any method wins more by moving further. Compare them where they have moved equally far.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from system.files import ROOT, UserError, write
from system.program import Parser, reported

CORES = len(os.sched_getaffinity(0))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.study", __doc__)
    add = parser.add_argument
    studies = "table tune ablation inversion drift confirm rates verdict".split()
    add("study", choices=studies, help="what is trained and compared")
    add("--out", type=Path, metavar="FOLDER", help="of runs and results (default: out/STUDY)")
    add("--jobs", type=int, default=CORES, metavar="N", help="runs at a time")
    add("--only", nargs="+", metavar="GROUP", help="of the study's groups of variants, by name")
    args = parser.parse_args(argv)
    args.out = args.out or Path("out", args.study)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1.")
    return args


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

from tqdm import tqdm

import toy
from evaluation import figures, tables
from lab import measure, report
from lab.studies import STUDIES, Study, Variant
from system.lock import alone
from training.folder import read_metrics

# -------------------------------------------------------------------------------------------------
# Running the variants: each in processes of its own, as many at a time as there are cores.


@dataclass(frozen=True)
class Job:
    """A variant trained from a seed, and judged; its folder says how much of that is done."""

    variant: Variant | None  # None: the base, which is only judged
    seed: int
    images: int
    folder: Path
    fold: int = 0
    task: str = "clean"

    def calls_per_step(self) -> float:
        return self.variant.calls_per_step

    def judged(self) -> tuple[int, ...]:
        return self.variant.judged if self.variant else (0,)

    def judging(self) -> int:
        """UNet calls of one judgement."""
        return self.images * len(toy.prompts("heldout")) * measure.STEPS * 2

    def calls(self) -> float:
        """UNet calls of training and judging, the unit of the progress bar."""
        return self.spent(self.judged()[-1], len(self.judged()))

    def done(self) -> float:
        """The part of them that lies in the folder."""
        judged = measure.read(self.folder, self.images)
        judged = [step for step in self.judged() if str(step) in judged]
        return self.spent(len(read_metrics(self.folder)), len(judged))

    def spent(self, steps: int, judgements: int) -> float:
        training = steps * self.calls_per_step() if steps else 0
        return training + judgements * self.judging()

    def commands(self) -> list[list[str]]:
        """What Python is to run, one after the other."""
        judge = ["-m", "lab.measure", str(self.folder), "--images", str(self.images)]
        judge += ["--fold", str(self.fold)] if self.fold else []
        judge += ["--task", self.task] if self.task != "clean" else []
        judge += ["--exports", *map(str, self.judged())]
        if self.variant is None:
            return [judge]
        every = math.gcd(*self.variant.judged[:-1]) or self.variant.steps  # after the last, too
        train = [str(ROOT / "train_inpo.py"), "--model", "tiny", *self.variant.flags.split()]
        train += ["--seed", str(self.seed), "--steps", str(self.variant.steps)]
        train += ["--export-every", str(every), "--sample-every", "0"]
        if self.fold or self.task != "clean":
            pairs = toy.write_pairs_once("out/toy", 2048, fold=self.fold, task=self.task)
            train += ["--data", str(pairs)]
        return [[*train, "--out", str(self.folder)], judge]


def jobs_of(study: Study, out: Path, only: list[str] | None = None) -> list[Job]:
    """A job for each variant and seed, and first the base's. Raises UserError where `only` names a
    group that is none of the study's."""
    groups = {variant.group for variant in study.variants}
    if unknown := set(only or []) - groups:
        known = ", ".join(sorted(groups)) or "none in this study"
        raise UserError(f"--only {min(unknown)}: there are the groups {known}.")

    def folder(variant, seed):
        words = f"{variant.name} seed {seed}".lower().replace(",", "").split()
        return out / "runs" / "-".join(words)

    trained = [
        Job(variant, seed, study.images, folder(variant, seed), study.fold, study.task)
        for seed in study.seeds
        for variant in study.variants
        if not only or variant.group in only
    ]
    base = Job(None, 0, study.images, out / "runs" / f"base-{study.images}", study.fold, study.task)
    return [base, *trained]


children: set[subprocess.Popen] = set()  # they run now, and end with this process

# What a child runs first: Linux kills it when the thread that has started it ends, however it ends,
# so that it does not hold the lock of its run's folder when the study is started again.
TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which exec keeps
if os.getppid() == int(sys.argv[1]):  # else that end has come before
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def run_job(job: Job, threads: int):
    """Train and judge. Raises UserError with the log's last line where a command fails."""
    if job.done() >= job.calls():
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    log = job.folder.with_suffix(".log")
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    for words in job.commands():
        with open(log, "a") as file:
            command = [sys.executable, "-c", TIED, str(os.getpid()), *words]
            child = subprocess.Popen(command, stdout=file, stderr=file, env=env)
            children.add(child)
            code = child.wait()
            children.remove(child)
        if code:
            last = (log.read_text().strip().splitlines() or ["nothing was printed"])[-1]
            raise UserError(f"{' '.join(words)} failed: {last} (see {log}).")


def run_all(jobs: list[Job], at_once: int):
    """Run all jobs, with a progress bar in UNet calls. Raises UserError for the first that fails.

    Where one fails, and on Ctrl-C or SIGTERM, the others are stopped. The same command continues
    them from their last checkpoints."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threads, total = max(1, CORES // at_once), sum(job.calls() for job in jobs)
    start = round(sum(job.done() for job in jobs))
    bar = tqdm(total=round(total), initial=start, unit="call", unit_scale=True, desc="UNet calls")
    with bar, ThreadPoolExecutor(at_once) as pool:
        going = [pool.submit(run_job, job, threads) for job in jobs]
        try:
            while going:
                ended, going = wait(going, timeout=2, return_when=FIRST_EXCEPTION)
                for future in ended:
                    future.result()  # raises what the run raised
                bar.set_postfix(runs=f"{len(jobs) - len(going)} of {len(jobs)}")
                bar.update(round(sum(job.done() for job in jobs)) - bar.n)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.terminate()
            raise


def records(study: Study, jobs: list[Job]) -> list[dict]:
    """One entry per judgement: variant, seed, step, UNet calls up to it, and its scores. The base
    is the variant "base"."""
    found = []
    for job in jobs:
        measured = measure.read(job.folder, job.images)
        for step in job.judged():
            name = job.variant.name if job.variant else "base"
            calls = step * job.calls_per_step() if job.variant else 0
            entry = {"variant": name, "seed": job.seed, "step": step, "calls": calls}
            found.append(entry | measured[str(step)])
    return found


# -------------------------------------------------------------------------------------------------
# What is written: NAME.md (tables), NAME.json (win rates), judgements.json, pictures.


PROMPTS = toy.prompts("heldout")
TRADE = [("drift", "preference"), ("preference", "faithfulness")]  # what is gained, and its price


def seeds_of(results: report.Results) -> str:
    return f"training seeds {', '.join(map(str, results.seeds))}"


def write_table(results: report.Results, jobs: list[Job], out: Path) -> str:
    shortest = min(results.steps(name)[-1] for name in results.variants)
    columns = {f"after {shortest} steps": shortest, "at equal compute": -1}
    costs = {name: [] for name in results.variants}
    shown = {"base": jobs[0].folder / "images" / "step_000000"}
    for job in jobs[1:]:
        fix = "delete that folder; the same command trains again"
        if (cost := tables.read_cost(job.folder, fix)) is None:
            raise UserError(f"{job.folder} has no cost.json; {fix}.")
        costs[job.variant.name].append(cost)
        if job.seed == results.seeds[0]:
            last = f"step_{job.variant.steps:06d}"
            shown[job.variant.name] = job.folder / "images" / last
    axes = [("step", "wins"), ("step", "preference"), ("calls", "wins"), ("calls", "preference")]
    panels = report.panels(results, results.variants, axes + TRADE)
    figures.trajectories(panels, out / "table.png", f"The tiny model, {seeds_of(results)}")
    report.samples(shown, PROMPTS, out / "samples.png")
    parts = {
        "Wins on the hidden preference": report.wins_table(results, columns),
        f"Scores after {shortest} steps": report.scores_table(results, shortest),
        "Scores at equal compute": report.scores_table(results),
        "Where all have moved equally far": report.matched_table(results, results.variants),
        "Training cost, at equal compute": report.cost_table(costs),
    }
    return "\n".join(f"## {heading}\n\n{part}" for heading, part in parts.items())


def write_groups(results: report.Results, jobs: list[Job], out: Path, common: list[str]) -> str:
    """A table and panels for each group of variants, with the common variants before its own.

    Where there are common ones, a second table shows scores where all have moved equally far."""
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
    title = f"Variants of the tiny model, {seeds_of(results)}"
    figures.trajectories(panels, out.with_suffix(".png"), title)
    return text


def write_tune(results: report.Results, jobs: list[Job], out: Path) -> str:
    return write_groups(results, jobs, out / "tune", [])


def write_inversion(results: report.Results, jobs: list[Job], out: Path) -> str:
    shown = {"base": jobs[0].folder / "images" / "step_000000"}
    for job in jobs[1:]:
        if job.seed == results.seeds[0]:
            shown[job.variant.name] = job.folder / "images" / "step_000060"
    few = [name for name in results.variants if "eta" not in name]
    axes = [("step", "preference"), ("calls", "preference"), *TRADE, ("preference", "grain")]
    panels = report.panels(results, few, axes)
    title = f"Paths of inversion, {seeds_of(results)}"
    figures.trajectories(panels, out / "inversion.png", title, columns=3)
    report.samples({name: shown[name] for name in ["base", *few]}, PROMPTS, out / "samples.png")
    against = [
        [name, *(report.cell(results.wins(name, few[0], step), "rate") for step in (60, -1))]
        for name in results.variants[1:]
    ]
    heads = ["", f"wins over {few[0]}, %, after 60 steps", "at equal compute"]
    parts = {
        "After 60 steps": report.scores_table(results, 60, grain=True),
        "At equal compute": report.scores_table(results, grain=True),
        "Against the paper's path": tables.markdown(heads, against),
    }
    return "\n".join(f"### {heading}\n\n{part}" for heading, part in parts.items())


def write_drift(results: report.Results, jobs: list[Job], out: Path) -> str:
    panels = report.panels(results, results.variants, TRADE)
    figures.trajectories(panels, out / "drift.png", f"The first steps, {seeds_of(results)}")
    return report.matched_table(results, results.variants)


def write_confirm(results: report.Results, jobs: list[Job], out: Path) -> str:
    columns = {"after 60 steps": -1}
    return f"{report.scores_table(results, grain=True)}\n{report.wins_table(results, columns)}"


def write_rates(results: report.Results, jobs: list[Job], out: Path) -> str:
    return write_groups(results, jobs, out / "rates", [])


def write_ablation(results: report.Results, jobs: list[Job], out: Path) -> str:
    return write_groups(results, jobs, out / "ablation", ["recipe"])


WRITERS = {
    "table": write_table,
    "tune": write_tune,
    "ablation": write_ablation,
    "inversion": write_inversion,
    "drift": write_drift,
    "confirm": write_confirm,
    "rates": write_rates,
    "verdict": write_confirm,
}

# -------------------------------------------------------------------------------------------------
# The command line.


def main(argv: list[str] | None = None):
    args = parse(argv)
    with reported("lab.study"), alone(args.out):
        run(args)


def run(args: argparse.Namespace):
    study = STUDIES[args.study]()
    jobs = jobs_of(study, args.out, args.only)
    run_all(jobs, args.jobs)
    judgements = records(study, jobs)
    results = report.Results(judgements, toy.prompts("heldout", study.fold) * study.images)
    text, wins = WRITERS[args.study](results, jobs, args.out), report.all_wins(results)
    write(args.out / "judgements.json", json.dumps(judgements))
    write(args.out / f"{args.study}.md", text)
    write(args.out / f"{args.study}.json", json.dumps(wins, indent=1) + "\n")
    print(text)
    committed = ROOT / "docs" / f"{args.study}.json"
    if committed.exists():
        print(report.compare(wins, json.loads(committed.read_text()), f"docs/{committed.name}"))


if __name__ == "__main__":
    main()
