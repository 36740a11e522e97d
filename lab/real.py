"""Real weights, one command: a short LoRA run on SDXL, judged, with one file to send back.

    python -m lab.real --dry-run             # check everything, download what is missing, stop
    python -m lab.real                       # SDXL, 500 pairs of Pick-a-Pic v2  (make real)
    python -m lab.real --data mine.parquet   # your own pairs
    python -m lab.real --model tiny          # the same on a CPU, with the tiny model

Four phases, and the same command resumes in the one that was interrupted:

    checks      hub, disk, GPU, pairs, prompts, judges: before any time of the GPU
    training    train_inpo.py --recipe lora: 50 steps of 10 pairs, each pair once
    pictures    evaluate.py: 50 prompts before and after, same seeds; PickScore's win rate
    report      out/real/report.zip, which is to be sent back, and report.md

Of a data set on the hub it takes one parquet file, the first of the split train: 0.5 GB of the 335
of Pick-a-Pic v2. The learning rate is 1e-4, five times that of --recipe lora, since the run has a
twentieth of its steps: AdamW moves a weight by about lr a step, so it goes a quarter as far. The
pictures take 25 sampling steps.

**Not yet run on SDXL or SD1.5.** What the report expects of them is computed or published.
"""

import argparse
from pathlib import Path

from evaluation import own
from evaluation.published import TITLES, TOY
from system.hub import MIRROR, PRESETS
from system.program import Parser, reported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.real", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--data", metavar="PAIRS",
        help="as of train_inpo.py; of a hub id one parquet file is downloaded (if not given "
             f"{MIRROR}; for --model tiny its own pairs)")
    add("--model", default="sdxl", help="sdxl, sd15, tiny, a hub id or a folder")
    add("--pairs", type=int, default=500, metavar="N", help="pairs to train on, each once")
    add("--steps", type=int, default=50, metavar="N", help="optimizer steps, of PAIRS / STEPS each")
    add("--prompts", metavar="SET",
        help="as of evaluate.py (if not given parti; for --model tiny toy)")
    add("--limit", type=int, default=50, metavar="N", help="prompts to draw before and after")
    add("--scorers", nargs="+", type=own.choice(*TITLES), metavar="SCORER",
        help="as of evaluate.py (if not given pickscore; for --model tiny its own judges)")
    add("--scorer-folder", type=Path, metavar="FOLDER",
        help="copies of the scorers' hub repositories, as FOLDER/owner/name (default: the hub)")
    add("--out", type=Path, default=Path("out/real"), metavar="FOLDER",
        help="of pairs, run, pictures and report")
    add("--dry-run", action="store_true",
        help="check everything, download what the checks need, and stop")
    # fmt: on
    args = parser.parse_args(argv)
    tiny = PRESETS.get(args.model, args.model) == PRESETS["tiny"]
    args.data = args.data or ("toy" if tiny else MIRROR)
    args.prompts = args.prompts or ("toy" if tiny else "parti")
    args.scorers = args.scorers or ([*TOY] if tiny else ["pickscore"])
    for flag in ("pairs", "steps", "limit"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} must be at least 1.")
    if args.pairs < args.steps:
        parser.error(f"--pairs {args.pairs}: must be at least --steps {args.steps}.")
    return args


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from PIL import Image
from tqdm import tqdm

from evaluation.published import PERCENT
from lab import compare, expected, sending, taking
from lab.study import TIED
from system.files import ROOT, UserError, differences, read_json, write
from system.lock import alone
from system.processes import code_version
from training import budget
from training.folder import finished, read_metrics

STATE = "real.json"  # of State
LR, CHECKPOINTS = "1e-4", 10
SHARE = budget.SHARE  # of a large product's rate, for the expected times
PHASES = ("checks", "training", "pictures", "report")

# -------------------------------------------------------------------------------------------------
# The commands, which are those that a user would type.


def training_words(args: argparse.Namespace, batch: int, large: bool) -> list[str]:
    words = ["train_inpo.py", "--model", args.model, "--recipe", "lora"]
    words += ["--data", str(args.out / "pairs.parquet"), "--out", str(args.out / "run")]
    words += ["--steps", str(args.steps), "--batch", str(batch)]
    words += ["--checkpoint-every", str(CHECKPOINTS), "--sample-every", str(args.steps)]
    if large:
        return [*words, "--micro-batch", "1", "--warmup", "0", "--lr", LR]
    return [*words, "--micro-batch", str(batch)]  # a CPU would wait for itself


def judging_words(args: argparse.Namespace) -> list[str]:
    words = ["evaluate.py", "--models", f"before={args.model}", f"after={args.out / 'run'}"]
    words += ["--prompts", args.prompts, "--limit", str(args.limit)]
    words += ["--out", str(args.out / "judged"), "--scorers", *args.scorers]
    if PRESETS.get(args.model) != PRESETS["tiny"]:
        words += ["--steps", str(taking.SAMPLING)]
    return words + (["--scorer-folder", str(args.scorer_folder)] if args.scorer_folder else [])


def run(words: list[str], log: Path, total: int, done: Callable[[], int], unit: str):
    """A program of ours, with a progress bar; what it says goes to the log. Raises UserError with
    its last line where it fails. A signal to stop is passed on, so that it saves a checkpoint."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", TIED, str(os.getpid()), str(ROOT / words[0]), *words[1:]]
    options = {"stderr": subprocess.STDOUT, "env": env, "start_new_session": True}
    with open(log, "a") as file:
        child = subprocess.Popen(command, stdout=file, **options)
    bar = tqdm(total=total, initial=min(done(), total), unit=unit, desc=words[0])
    try:
        while child.poll() is None:
            time.sleep(0.5)
            if new := min(done(), total) - bar.n:
                bar.update(new)
    except BaseException:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(120)
        child.kill()
        raise
    finally:
        bar.close()
    if child.returncode:
        said = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())[-1]
        raise UserError(f"{words[0]} failed: {said.rstrip('.') or 'silently'} (see {log}).")


# -------------------------------------------------------------------------------------------------
# State: what is done, and is not done again.


class State:
    """real.json: {settings, done: [phase, ...], spent: {phase: seconds}, what the checks found}."""

    def __init__(self, args: argparse.Namespace):
        self.file = args.out / STATE
        names = "model data pairs steps prompts limit scorers"
        settings = {name: getattr(args, name) for name in names.split()}
        self.kept = {"settings": settings, "done": [], "spent": {}}
        if self.file.exists():
            self.kept = read_json(self.file, f"delete {args.out} to begin again")
            if differ := differences(self["settings"], settings):
                raise UserError(
                    f"--out {args.out}: holds a test with other settings ({differ}); name another "
                    "folder, or repeat that command to resume it."
                )

    def __getitem__(self, key: str):
        return self.kept[key]

    def add(self, found: dict):
        self.kept |= found

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note how long a phase takes, over all attempts, and that it is done."""
        begin = time.monotonic()
        try:
            yield
            self["done"].append(name)
        finally:
            spent = self["spent"].get(name, 0) + time.monotonic() - begin
            self["spent"][name] = round(spent, 1)
            write(self.file, json.dumps(self.kept, indent=2) + "\n")


def say_next(phase: str, what: str, flops: float, rate: float | None):
    """One sentence on what comes, with the time that it should take."""
    takes = "no estimate for a CPU"
    if rate:
        minutes = max(1, round(flops / (SHARE * rate) / 60))
        takes = f"about {minutes} min (computed, at {SHARE:.0%} of what a product reaches here)"
    number = PHASES.index(phase) + 1
    print(f"[{number}/{len(PHASES)}] Next, {phase}: {what}; {takes}.", flush=True)


# -------------------------------------------------------------------------------------------------
# The phases.


def train(args: argparse.Namespace, state: State):
    out, rate = args.out / "run", state["machine"].get("rate")
    what = f"{args.steps} steps of {state['batch']} pairs"
    say_next("training", what, state["flops"]["training"], rate)
    words = training_words(args, state["batch"], state["large"])
    if not finished(out, args.steps):
        log = args.out / "training.log"
        run(words, log, args.steps, lambda: len(read_metrics(out)), "step")


def draw(args: argparse.Namespace, state: State):
    out, rate = args.out / "judged", state["machine"].get("rate")
    total = 2 * state["prompts_drawn"]
    what = f"{total} pictures, before and after, then {', '.join(args.scorers)}"
    say_next("pictures", what, state["flops"]["pictures"], rate)
    log = args.out / "pictures.log"
    run(judging_words(args), log, total, lambda: len([*out.glob("images/*/*/*.png")]), "picture")


def look(folder: Path) -> dict[str, int]:
    """{drawn, flat: of one colour, same: before and after} of the pictures there."""
    before, after = (sorted(folder.glob(f"images/*/{name}/*.png")) for name in ("before", "after"))
    both = [(a, b) for a, b in zip(before, after, strict=False) if a.name == b.name]
    flat = sum(
        all(low == high for low, high in Image.open(file).convert("RGB").getextrema())
        for file in [*before, *after]
    )
    same = sum(
        Image.open(a).convert("RGB").tobytes() == Image.open(b).convert("RGB").tobytes()
        for a, b in both
    )
    return {"drawn": len(before) + len(after), "flat": flat, "same": same} if both else {}


def report(args: argparse.Namespace, state: State, failed: str = "") -> list[expected.Row]:
    """Write report.zip of what there is; failed: why there is no more."""
    folder, judged, results, cost = args.out / "run", args.out / "judged", {}, {}
    lines = read_metrics(folder)
    with contextlib.suppress(UserError):
        results = read_json(judged / "results.json")
    with contextlib.suppress(UserError):
        cost = read_json(folder / "cost.json")
    facts = {key: state[key] for key in "toy architecture batch beta memory machine".split()}
    facts |= {"lines": lines, "cost": cost, "flops": state["flops"]["training"]}
    facts |= {"all_flops": sum(state["flops"].values()), "steps": args.steps}
    facts |= {"seconds": state["spent"], "pictures": look(judged)}
    told = {own.title(name): sending.judge(name) for name in args.scorers}
    for key in ("win_rates", "scores"):  # without the names of a user's files
        facts[key] = [
            {k: v for k, v in one.items() if k != "set"} | {"scorer": told[one["scorer"]]}
            for one in results.get(key, [])
            if one.get("category") is None and one["scorer"] not in PERCENT
        ]
    rows = expected.judge(facts)

    pictures = {"curves.png": args.out / "curves.png"}
    if any("loss" in line for line in lines):
        compare.compare([folder], pictures["curves.png"])
    pictures["samples.png"] = folder / "samples" / f"step_{args.steps:06d}.png"
    for name in results.get("sets", {}):
        pictures["pictures.png"] = judged / f"{name}.png"
    given, secret = sending.settings(state["settings"])
    given |= {"batch": state["batch"], "code": code_version()}
    about = {"failed": failed, "settings": given}
    about |= {"machine": state["machine"], "seconds": state["spent"], "cost": cost}
    about |= {"plan": {"bytes": state["memory"], "flops": state["flops"]}}
    about |= {key: facts[key] for key in ("win_rates", "scores", "pictures")}
    folders = [args.out, *filter(None, [args.scorer_folder])]
    hidden = [*secret, *(str(path.absolute()) for path in folders)]
    hidden += [str(path) for path in folders if "/" in str(path)]  # "run" is a word, too
    logs = sorted(args.out.glob("*.log"), key=lambda file: file.stat().st_mtime)
    log = logs[-1].read_text(errors="replace") if failed and logs else ""
    sending.pack(args.out, about, rows, lines, pictures, hidden, log)
    return rows


def run_all(args: argparse.Namespace):
    state = State(args)
    if "checks" not in state["done"]:
        print(
            "[1/4] Next, checks: disk, GPU, pairs, prompts, judges; a few minutes, and the first "
            "time downloads, of up to 20 GB for SDXL."
        )
        with state.phase("checks"):
            state.add(taking.check(args, training_words))
    if args.dry_run:
        print(f"All checks have passed: {state['summary']}")
        return
    try:
        for name, action in (("training", train), ("pictures", draw)):
            if name not in state["done"]:
                with state.phase(name):
                    action(args, state)
    except UserError as error:
        report(args, state, str(error))
        raise UserError(
            f"{str(error).rstrip('.')}; {args.out / sending.REPORT} says how far it came, please "
            "send it; the same command resumes."
        ) from error
    print("[4/4] Next, report: what was expected and what came out, in one file; seconds.")
    rows = report(args, state)
    print(f"\n{sending.summary(rows)}\n")
    print(f"Please send {args.out / sending.REPORT}: it names neither you nor your machine.")


def main(argv: list[str] | None = None):
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with reported("lab.real"), alone(args.out):
        run_all(args)


if __name__ == "__main__":
    main()
