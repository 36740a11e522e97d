"""Studies in miniature: train many variants of the tiny model, measure them on the way, compare.

    python -m lab.study tune        # six to ten settings for each entry              (make tune)
    python -m lab.study leaderboard # methods and crosses, three seeds each   (make leaderboard)
    python -m lab.study noisy       # eight entries, where every fourth label is wrong     (also)
    python -m lab.study red         # where the judge likes red, whatever the captions    (also)
    python -m lab.study precision   # InPO in half precision, where there are kernels     (also)
    python -m lab.study ablation    # what the parts of InPO do                  (make ablation)
    python -m lab.study inversion   # paths of inversion, five seeds
    python -m lab.study drift       # some of them early on, where all have moved equally far
    python -m lab.study confirm     # the chosen path, on seeds and captions not used before
    python -m lab.study rates       # three paths, each at three learning rates
    python -m lab.study verdict     # each at the rate that was chosen, on new seeds and captions

The same command continues a study; runs that are done are kept. A variant is a line of
train_inpo.py. In `tune` and the leaderboard all take the same number of UNet calls
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
    studies = "leaderboard noisy red precision tune ablation inversion drift confirm".split()
    studies += ["rates", "verdict"]
    add("study", choices=studies, help="what is trained and compared")
    add("--out", type=Path, metavar="FOLDER", help="of runs and results (default: out/STUDY)")
    add("--jobs", type=int, default=CORES, metavar="N", help="runs at a time")
    add("--report", type=Path, metavar="FILE", help="Markdown file, whose section is replaced")
    add("--only", nargs="+", metavar="NAME", help="of the study's variants, or groups of them")
    args = parser.parse_args(argv)
    args.out = args.out or Path("out", args.study)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1.")
    if args.only and args.report and args.study != "tune":
        parser.error("--only: with --report it would replace the whole section; leave one out.")
    if args.report and not args.report.is_file():
        parser.error(f"--report {args.report}: must be a Markdown file that exists.")
    return args


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

from tqdm import tqdm

import toy
from lab import measure, report, writers
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
        program = [str(ROOT / "train_inpo.py")]
        if self.variant.precision != "fp32":
            program = ["-m", "lab.half", self.variant.precision]
        train = [*program, "--model", "tiny", *self.variant.flags.split()]
        train += ["--seed", str(self.seed), "--steps", str(self.variant.steps)]
        train += ["--export-every", str(every), "--sample-every", "0"]
        if self.fold or self.task != "clean":
            pairs = toy.write_pairs_once("out/toy", 2048, fold=self.fold, task=self.task)
            train += ["--data", str(pairs)]
        return [[*train, "--out", str(self.folder)], judge]


def jobs_of(study: Study, out: Path, only: list[str] | None = None) -> list[Job]:
    """A job for each variant and seed, and first the base's. Raises UserError where `only` names
    neither a variant of the study nor a group of them."""
    groups = {variant.group for variant in study.variants}
    if unknown := set(only or []) - groups - {variant.name for variant in study.variants}:
        known = ", ".join(sorted(groups)) or "none in this study"
        raise UserError(f"--only {min(unknown)}: there are the groups {known}.")

    def folder(variant, seed):
        words = f"{variant.name} seed {seed}".lower().replace(",", "").split()
        return runs / "-".join(words)

    runs = out / "runs" if study.task == "clean" else out / "runs" / study.task

    trained = [
        Job(variant, seed, study.images, folder(variant, seed), study.fold, study.task)
        for seed in study.seeds
        for variant in study.variants
        if not only or {variant.name, variant.group} & set(only)
    ]
    base = Job(None, 0, study.images, runs / f"base-{study.images}", study.fold, study.task)
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


def records(jobs: list[Job]) -> list[dict]:
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
# The command line.


def main(argv: list[str] | None = None):
    args = parse(argv)
    with reported("lab.study"), alone(args.out):
        run(args)


def run(args: argparse.Namespace):
    study = STUDIES[args.study]()
    jobs = jobs_of(study, args.out, args.only)
    run_all(jobs, args.jobs)
    judgements = records(jobs)
    equal = {variant.name: variant.equal for variant in study.variants if variant.equal}
    prompts = toy.prompts("heldout", study.fold) * study.images
    results = report.Results(judgements, prompts, equal)
    text, wins = writers.WRITERS[args.study](results, jobs, args.out), report.all_wins(results)
    write(args.out / f"{args.study}_judgements.json", json.dumps(judgements))
    write(args.out / f"{args.study}.md", text)
    write(args.out / f"{args.study}.json", json.dumps(wins, indent=1) + "\n")
    print(text)
    committed = ROOT / "docs" / f"{args.study}.json"
    if committed.exists():
        print(report.compare(wins, json.loads(committed.read_text()), f"docs/{committed.name}"))
    if args.report:
        writers.publish(args.study, text, args.out, args.report)


if __name__ == "__main__":
    main()
