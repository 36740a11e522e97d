"""Kill a run again and again, at random instants, and compare it with an undisturbed one.

    python -m lab.chaos --kills 20 --out out/chaos      # make chaos: writes docs/reliability.md

Both runs have the same flags. In the disturbed one a SIGKILL ends all ranks or one of them, or a
SIGTERM stops one rank; then the same command starts it again, until it finishes. Each step writes a
checkpoint, so that many kills come while one is written. At the end the weights must be equal to
the last bit, and every step must have been logged once.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from system.files import ROOT, UserError, write
from system.program import Parser, reported

FLAGS = "--model tiny --steps 40 --batch 4 --micro-batch 2 --checkpoint-every 1 --sample-every 20"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.chaos", __doc__)
    add = parser.add_argument
    add("--kills", type=int, default=20, metavar="N", help="how often the run is killed or stopped")
    add("--ranks", type=int, default=2, metavar="N", help="processes of each run")
    add("--seed", type=int, default=0, help="of the instants")
    add("--flags", default=FLAGS, help="of train_inpo.py")
    add("--out", type=Path, default=Path("out/chaos"), metavar="FOLDER", help="of both runs")
    add("--report", type=Path, metavar="FILE", help="where to write docs/reliability.md")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

from safetensors.torch import load_file
from tqdm import tqdm

from training.folder import read_metrics

KINDS = {
    "SIGKILL, all ranks": (signal.SIGKILL, True),
    "SIGKILL, one rank": (signal.SIGKILL, False),
    "SIGTERM, one rank": (signal.SIGTERM, False),
}
LATE = 120  # seconds after which a rank that should have ended is a failure


def start(flags: list[str], out: Path, ranks: int) -> list[subprocess.Popen]:
    """The ranks of a run, as a launcher starts them; what they say goes to OUT.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train_inpo.py"), *flags, f"--out={out}"]
    log = open(out.with_suffix(".log"), "a")
    return [
        subprocess.Popen(
            command, env=common | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=log, stderr=log
        )
        for r in range(ranks)
    ]


def wait(children: list[subprocess.Popen], out: Path) -> list[int]:
    """The exit codes. Raises UserError where a rank does not end."""
    try:
        return [child.wait(LATE) for child in children]
    except subprocess.TimeoutExpired as error:
        for child in children:
            child.kill()
        log = out.with_suffix(".log")
        raise UserError(f"a rank was still there after {LATE} s; see {log}.") from error


def step_of(out: Path) -> int:
    lines = read_metrics(out)
    return lines[-1]["step"] if lines else 0


def disturb(children, out: Path, name: str, span: float, dice: random.Random) -> dict | None:
    """Kill a run that starts, trains or saves, at a random instant; None where it ended earlier."""
    before, since = step_of(out), time.time()
    place = dice.choices(("start", "step", "saving"), (0.15, 0.35, 0.5))[0]

    def until(happens):
        while not happens() and all(child.poll() is None for child in children):
            time.sleep(0.002)

    if place == "start":
        time.sleep(dice.uniform(0, 5 * span))
    else:
        until(lambda: step_of(out) > before)  # so that every start makes progress
        if place == "saving":
            until(lambda: any((out / "checkpoints").glob("*.partial")))
        time.sleep(dice.uniform(0, 0.1 if place == "saving" else span))
    if any(child.poll() is not None for child in children):
        return None
    number, everyone = KINDS[name]
    for child in children if everyone else [dice.choice(children)]:
        child.send_signal(number)
    saving = any((out / "checkpoints").glob("*.partial"))
    wait(children, out)
    return {
        "kind": name,
        "seconds": time.time() - since,
        "step": step_of(out),
        "saving": saving,
        "left": sorted(path.name for path in (out / "checkpoints").glob("step_*")),
    }


def equal(a: Path, b: Path) -> bool:
    """Whether two runs have the same weights, bit by bit, and the same metrics but for times."""
    files = ("unet/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors")
    weights = [[load_file(out / name) for name in files if (out / name).exists()] for out in (a, b)]
    times = {"seconds", "pairs_per_second"}
    metrics = [
        [{k: v for k, v in line.items() if k not in times} for line in read_metrics(out)]
        for out in (a, b)
    ]
    same = weights[0] and [w.keys() for w in weights[0]] == [w.keys() for w in weights[1]]
    return bool(
        same
        and all(x[k].equal(y[k]) for x, y in zip(*weights, strict=True) for k in x)
        and metrics[0] == metrics[1]
    )


def chaos(
    flags: list[str], folder: Path, kills: int, ranks: int = 2, seed: int = 0, span: float = 2.0
) -> list[dict]:
    """Train undisturbed, then with this many kills; returns what each kill did. Raises UserError.

    span: a kill comes within this many seconds after a step."""
    calm, storm, dice, done = folder / "calm", folder / "storm", random.Random(seed), []
    for out in (calm, storm):
        shutil.rmtree(out, ignore_errors=True)
        out.with_suffix(".log").unlink(missing_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
    if any(wait(start(flags, calm, ranks), calm)):
        raise UserError(f"the undisturbed run failed; see {calm}.log.")
    kinds = [list(KINDS)[k % len(KINDS)] for k in range(kills)]
    dice.shuffle(kinds)
    for name in tqdm(kinds, desc="kills", unit="kill"):
        event = disturb(start(flags, storm, ranks), storm, name, span, dice)
        if event is None:
            raise UserError(f"the run finished after {len(done)} kills; give it more --steps.")
        done.append(event)
    if any(wait(start(flags, storm, ranks), storm)):
        raise UserError(f"the run did not finish after {kills} kills; see {storm}.log.")
    if not equal(calm, storm):
        raise UserError(f"{storm} differs from {calm}, which nobody disturbed.")
    return done


def report(done: list[dict], args: argparse.Namespace, seconds: float) -> str:
    """docs/reliability.md."""
    rows = [
        f"| {i} | {one['kind']} | {one['step']} | {'yes' if one['saving'] else ''} | "
        f"{', '.join(one['left'])} |"
        for i, one in enumerate(done, 1)
    ]
    during = sum(one["saving"] for one in done)
    return "\n".join(
        [
            "# A run that is killed again and again ends with the same weights",
            "",
            "```",
            f"python -m lab.chaos --kills {args.kills} --ranks {args.ranks} --seed {args.seed}",
            "```",
            "",
            f"{date.today()}, {os.cpu_count()} cores ({platform.machine()}), no GPU, "
            f"{seconds:.0f} s. Two runs on {args.ranks} ranks:",
            "",
            "```",
            f"train_inpo.py {args.flags}",
            "```",
            "",
            f"One was left alone. One was killed or stopped {len(done)} times at random instants, "
            f"{during} of them while a checkpoint was being written, and each time started again "
            "by the same command.",
            "**Their weights are equal to the last bit**, and so are their metrics, but for times.",
            "",
            "| | signal | step | while saving | in checkpoints/ afterwards |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "`.partial` is a checkpoint that was being written, `.old` one that was being removed;",
            "neither is ever read. With SIGTERM the ranks agree on a step, save it and leave.",
            "A SIGKILL costs the time since the last checkpoint: here a step, with SDXL's recipe",
            "up to 50 (`--checkpoint-every`).",
            "",
        ]
    )


def main(argv: list[str] | None = None):
    args, since = parse(argv), time.time()
    with reported("lab.chaos"):
        done = chaos(args.flags.split(), args.out, args.kills, args.ranks, args.seed)
    text = report(done, args, time.time() - since)
    write(args.out / "kills.json", json.dumps(done, indent=1) + "\n")
    if args.report:
        write(args.report, text)
    print(text)


if __name__ == "__main__":
    main()
