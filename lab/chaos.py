"""Kill every program again and again, at random instants, and compare with undisturbed ones.

    python -m lab.chaos --out out/chaos      # make chaos: writes docs/reliability.md

Training, an export of its checkpoint, a judgement of its model, a study and pairs that a model
draws, each with the same command twice. One is left alone. The other one is killed or stopped, and
the same command starts it again, until it ends. Then both must have left the same files, equal byte
for byte but for times.

A kill waits for a moment, which is known by the file that is written then, and for a random time.
Each step of the training writes a checkpoint, so that many kills come while one is written.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

from evaluation import tables
from system.files import ROOT, UserError, write, write_section
from system.program import Parser, reported

FLAGS = "--model tiny --steps 40 --batch 4 --micro-batch 2 --workers 2 --sample-every 20"
FLAGS += " --checkpoint-every 1 --export-every 2"
NAMES = "train", "export", "evaluate", "study", "pairs"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.chaos", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--programs", nargs="+", choices=NAMES, default=NAMES,
        help="export and evaluate take what train has left in --out")
    add("--kills", type=int, default=15, metavar="N",
        help="how often training is killed or stopped; the others 4 to 6 times")
    add("--ranks", type=int, default=2, metavar="N", help="processes of the training")
    add("--seed", type=int, default=0, help="of the instants")
    add("--flags", default=FLAGS, help="of train_inpo.py")
    add("--out", type=Path, default=Path("out/chaos"), metavar="FOLDER", help="of all that is run")
    add("--report", type=Path, metavar="FILE", help="Markdown file, whose section is replaced")
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

from tqdm import tqdm

# -------------------------------------------------------------------------------------------------
# What is killed, and when.


class Program(NamedTuple):
    """What Python is to run for an output folder, and the moments at which it is killed, in their
    order: {name: pattern of the files that are written then}, "" for the start."""

    words: Callable[[Path], list]
    moments: dict[str, str]
    ranks: int = 1


# A study of one variant, in place of the 28 of `tune`.
STUDY = """
import sys
from lab import study

flags = "--inversion-steps 2 --batch 2 --micro-batch 2 --workers 0 --checkpoint-every 1"
variants = [study.Variant("InPO", flags, (1, 2), "InPO")]
study.STUDIES["confirm"] = lambda: study.Study(variants, [0], 1)
study.main(["confirm", "--out", sys.argv[1]])
"""


def programs(flags: list[str], ranks: int, folder: Path) -> dict[str, Program]:
    """Of NAMES. What comes after training takes the model of the undisturbed one."""
    model, judged = folder / "train" / "calm", "--prompts toy --limit 9 --steps 10 --batch 1"
    make = "make --model tiny --prompts toy-train --limit 9 --steps 10 --batch 1 --judge preference"
    start = {"its start": ""}
    train = {"a step": "metrics.jsonl", "a checkpoint": "checkpoints/*.partial"}
    train |= {"a UNet in unets/": "unets/*.new", "its end": "vae/*"}
    judge = {"a picture": "images/*/*/*.png", "its tables": "scores.json"}
    draw = {"a picture": "*.pictures/*.png", "its scores": "*.pictures/*/*.json"}
    draw |= {"its pairs": "*.parquet.*.new"}
    study = {"a training": "runs/*/metrics.jsonl", "a judgement": "runs/*/images/*/*.png"}
    return {
        "train": Program(
            lambda out: [ROOT / "train_inpo.py", *flags, f"--out={out}"], start | train, ranks
        ),
        "export": Program(
            lambda out: ["-m", "training.export", model, f"--out={out / 'model'}"],
            start | {"its writing": "model.*.new"},
        ),
        "evaluate": Program(
            lambda out: (
                [ROOT / "evaluate.py", "--models", "base=tiny", f"aligned={model}"]
                + [*judged.split(), f"--out={out}"]
            ),
            start | judge,
        ),
        "study": Program(
            lambda out: ["-c", STUDY, out],
            start | study | {"its tables": "confirm_judgements.json"},
        ),
        "pairs": Program(
            lambda out: [ROOT / "pairs.py", *make.split(), f"--out={out / 'pairs.parquet'}"],
            start | draw,
            ranks,
        ),
    }


ALL, ONE = "all processes", "one process"
KINDS = [(signal.SIGHUP, ALL), (signal.SIGKILL, ONE), (signal.SIGTERM, ONE), (signal.SIGKILL, ALL)]
LATE = 300  # seconds after which a process that should have ended is a failure
GRACE = 60  # seconds after which a launcher ends the ranks beside one that has ended


def start(program: Program, out: Path) -> list[subprocess.Popen]:
    """Its ranks, as a launcher starts them, each in a session of its own; what they say goes to
    OUT.log."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if program.ranks > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= {"WORLD_SIZE": str(program.ranks)}
    out.parent.mkdir(parents=True, exist_ok=True)
    options = {"cwd": ROOT, "start_new_session": True, "stderr": subprocess.STDOUT}
    children = []
    for rank in range(program.ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if program.ranks > 1 else {}
        with open(out.with_suffix(".log"), "a") as log:
            command = [sys.executable, *map(str, program.words(out))]
            children.append(subprocess.Popen(command, env=env | place, stdout=log, **options))
    return children


def send(number: int, child: subprocess.Popen):
    """To a process and all that it has started."""
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        pass


def wait(children: list[subprocess.Popen], out: Path) -> list[int]:
    """The exit codes. Raises UserError where a process does not end."""
    try:
        return [child.wait(LATE) for child in children]
    except subprocess.TimeoutExpired as error:
        for child in children:
            send(signal.SIGKILL, child)
        log = out.with_suffix(".log")
        raise UserError(f"a process was still there after {LATE} s; see {log}.") from error


def end_late(children: list[subprocess.Popen]):
    """Once one has ended, give the others some time, then end them as a launcher does: ranks may
    wait ten minutes for one that has not come yet."""
    end = time.monotonic() + GRACE
    while time.monotonic() < end and any(child.poll() is None for child in children):
        time.sleep(0.05)
    for child in children:
        send(signal.SIGTERM, child)


def half_written(out: Path) -> list[str]:
    found = [path for end in ("new", "partial", "old") for path in out.rglob(f"*.{end}")]
    return sorted(re.sub(r"\.\w{8}\.new", ".new", str(path.relative_to(out))) for path in found)


def disturb(program: Program, out: Path, moment: str, kind, span: float, dice) -> dict | None:
    """Start it, and kill it once that moment has come; None where it ended earlier."""
    since, began, pattern = time.monotonic(), time.time(), program.moments[moment]
    children = start(program, out)

    def happens() -> bool:
        for path in out.glob(pattern):
            try:
                if path.stat().st_mtime > began:
                    return True
            except FileNotFoundError:
                pass  # it has its name now
        return False

    def ended() -> bool:
        return any(child.poll() is not None for child in children)

    while pattern and not happens() and not ended():
        time.sleep(0.002)
    time.sleep(dice.uniform(0, span))
    if ended():
        if any(codes := wait(children, out)):
            raise UserError(f"it failed by itself ({codes}); see {out.with_suffix('.log')}.")
        return None
    number, whom = kind
    if whom == ONE:
        dice.choice(children).send_signal(number)
    else:
        for child in children:
            send(number, child)
    event = {"kind": f"{number.name}, {whom}", "moment": moment, "left": half_written(out)}
    end_late(children)
    wait(children, out)
    return event | {"seconds": time.monotonic() - since}


# -------------------------------------------------------------------------------------------------
# Are the files the same?

# What the clock and the machine say, in metrics.jsonl, cost.json, README.md and result.json.
TIMES = rb'(seconds|pairs_per_second|waiting|device_hours|peak_memory|"cost\.json)[" :|]+[0-9.e+-]+'
OTHERS = ("*.log", "*.lock", "*/tensorboard/*", "*/checkpoints/step_*/*")


def contents(out: Path) -> dict[str, bytes]:
    """The files in a folder, without times and without its own name."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if any(Path("out", name).match(other) for other in OTHERS):
            continue
        found[name] = b"" if path.is_dir() else path.read_bytes().replace(bytes(out), b"OUT")
        if path.suffix in (".json", ".jsonl", ".md"):
            found[name] = re.sub(TIMES, b"", found[name])
    return found


def difference(a: Path, b: Path) -> str | None:
    """The first file that two folders do not have alike."""
    ours, theirs = contents(a), contents(b)
    names = sorted(ours.keys() | theirs.keys())
    return next((name for name in names if ours.get(name) != theirs.get(name)), None)


# -------------------------------------------------------------------------------------------------
# The storm.


def storm(
    program: Program, folder: Path, kills: int, seed: int = 0, span: float = 0.2
) -> list[dict]:
    """Run it undisturbed, then with so many kills at most; returns what each did. Raises UserError.

    span: a kill comes within this many seconds after its moment; at the start, within half the time
    that the undisturbed one takes, and 10 s."""
    calm, disturbed, dice, done = folder / "calm", folder / "storm", random.Random(seed), []
    shutil.rmtree(folder, ignore_errors=True)
    since = time.monotonic()
    if any(wait(start(program, calm), calm)):
        raise UserError(f"the undisturbed one failed; see {calm}.log.")
    early = min(10, (time.monotonic() - since) / 2)
    names = list(program.moments)
    moments = sorted((names[k % len(names)] for k in range(kills)), key=names.index)
    for k, moment in enumerate(tqdm(moments, desc=folder.name, unit="kill")):
        pattern, kind = program.moments[moment], KINDS[k % len(KINDS)]
        brief = pattern.endswith((".new", ".partial"))  # they are there for less than a second
        within = (span / 4 if brief else span) if pattern else early
        event = disturb(program, disturbed, moment, kind, within, dice)
        if event is None:  # the kill before came when all was done but the end of the process
            break
        done.append(event)
    if any(wait(start(program, disturbed), disturbed)):
        raise UserError(f"it did not end well after {len(done)} kills; see {disturbed}.log.")
    if name := difference(calm, disturbed):
        raise UserError(f"{disturbed / name} differs from {calm / name}, which nobody disturbed.")
    return done


def chaos(args: argparse.Namespace) -> dict[str, list[dict]]:
    """{program: what each kill did}. Raises UserError."""
    folder, done = args.out.resolve(), {}
    signal.signal(signal.SIGHUP, lambda *_: None)  # or what is started would ignore it after nohup
    every = programs(args.flags.split(), args.ranks, folder)
    for name in NAMES:
        if name in args.programs:
            kills = {"train": args.kills, "export": 6, "evaluate": 6, "study": 4, "pairs": 8}[name]
            try:
                done[name] = storm(every[name], folder / name, kills, args.seed)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
    return done


def report(done: dict[str, list[dict]], args: argparse.Namespace, seconds: float) -> str:
    """The section of docs/reliability.md."""
    rows = [
        [name, one["kind"], one["moment"], ", ".join(one["left"][:3])]
        for name, events in done.items()
        for one in events
    ]
    during = sum(bool(one["left"]) for events in done.values() for one in events)
    head = ["program", "signal", "during", "half written, as the kill left it"]
    return (
        f"```\npython -m lab.chaos --kills {args.kills} --ranks {args.ranks} --seed {args.seed}\n"
        f"```\n\n{date.today()}, {os.cpu_count()} cores ({platform.machine()}), no GPU, "
        f"{seconds:.0f} s. `train` is, on {args.ranks} ranks,\n\n"
        f"```\ntrain_inpo.py {args.flags}\n```\n\n"
        "`export` is `training.export` of its last checkpoint, `evaluate` is `evaluate.py` of its "
        "model, `study` is `lab.study` of one variant, and `pairs` is `pairs.py make` on as many "
        "ranks as the training. Each was run undisturbed, and run again "
        f"with kills at random instants, {len(rows)} in all, {during} of them while something was "
        "half written; each time the same command started it again. **All files are equal byte for "
        "byte**, but for times; nothing half written is left.\n\n"
        f"{tables.markdown(head, rows)}\n"
        "`.partial` is a checkpoint that was being written, `.old` one that was being removed, "
        "`.new` any other file or folder that was being written; none is ever read, and the next "
        "start deletes it. At SIGTERM and SIGHUP the ranks of a training agree on a step, save it "
        "and leave. A SIGKILL costs the time since the last checkpoint: here a step, with SDXL's "
        "recipe up to 50 (`--checkpoint-every`).\n"
    )


def main(argv: list[str] | None = None):
    args, since = parse(argv), time.monotonic()
    with reported("lab.chaos"):
        done = chaos(args)
    text = report(done, args, time.monotonic() - since)
    write(args.out / "kills.json", json.dumps(done, indent=1) + "\n")
    if args.report:
        write_section(args.report, "Kills", text)
    print(text)


if __name__ == "__main__":
    main()
