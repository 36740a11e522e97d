"""Feed the programs damaged and odd inputs, thousands of them, and count what they do.

    python -m lab.fuzz                         # make fuzz: all kinds, and docs/reliability.md
    python -m lab.fuzz parquet --cases 100     # one kind

Hypothesis draws a case and, where one fails, looks for a smaller one that fails as well. Each case
runs in a process of its own, which may end in one of these ways; only the first two are allowed:

    correct      the program did its work, and what it made is what it should be
    sentence     it refused the input in one sentence
    mismatch     what it made differs: another pairing, another caption, other weights
    traceback    it ended in an exception, or was killed
    hang         it was still there after a minute
    memory       it took more than 2 GiB beyond what Python and the libraries take
"""

import argparse
import os
import time
from pathlib import Path

from system.program import Parser, reported

# Cases of each kind.
KINDS = {"parquet": 3000, "folders": 1500, "sources": 5000}
KINDS |= {"prompts": 300, "manifests": 300, "runs": 150}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.fuzz", __doc__)
    add = parser.add_argument
    add("kinds", nargs="*", metavar="KIND",
        help=f"one or more of {', '.join(KINDS)} (default: all)")  # fmt: skip
    add(
        "--cases",
        type=int,
        metavar="N",
        help=f"of each kind (default: {sum(KINDS.values()):,} in all)",
    )
    add("--seed", type=int, default=0, help="of the cases")
    add("--report", type=Path, metavar="FILE", help="Markdown file, whose section is replaced")
    args = parser.parse_args(argv)
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"there is no kind '{min(unknown)}'; take {', '.join(KINDS)}.")
    return args


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

# Cases run in forks, which must find no thread of a pool that their parent has started.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import contextlib
import io
import multiprocessing
import platform
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import date
from typing import NamedTuple

import datasets
import hypothesis
from tqdm import tqdm

from evaluation import tables
from lab import odd_inputs, odd_sources
from system.files import UserError, write_section

TARGETS = odd_inputs.TARGETS | {"sources": odd_inputs.Kind(odd_sources.sources, odd_sources.run)}
LATE, GROWTH = 60, 2**21  # seconds; KiB
ALLOWED = ("correct", "sentence")

# -------------------------------------------------------------------------------------------------
# Running cases.


class Ended(NamedTuple):
    outcome: str
    said: str
    memory: int  # KiB, at most


def isolated(work: Callable[[], str]) -> Ended:
    """How work() ends in a process of its own, whose output is `said`."""
    with tempfile.TemporaryFile() as output:
        if (child := os.fork()) == 0:
            _work(work, output.fileno())
        end, status = time.monotonic() + LATE, 0
        while (done := os.wait4(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
            time.sleep(0.005)
        if done[0] == 0:
            os.kill(child, signal.SIGKILL)
            done = os.wait4(child, 0)
            status = "hang"
        output.seek(0)
        said = output.read().decode("utf-8", "replace")
        status = status or ENDS.get(os.waitstatus_to_exitcode(done[1]), "traceback")
        memory = done[2].ru_maxrss
        if status in ALLOWED and memory - OWN > GROWTH:
            status = "memory"
        if status in ALLOWED and "Traceback" in said:
            status = "traceback"
    return Ended(status, said, memory)


ENDS = {0: "correct", 2: "sentence", 3: "mismatch"}
OWN = 2**40  # KiB of a case that does nothing


def _work(work: Callable[[], str], output: int):
    """Run work() with its output there, and leave with its outcome."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(output, "w")
    code = 4
    try:
        datasets.disable_progress_bars()
        found = work()
        print(found)
        code = 0 if found == "correct" else 3
    except UserError as error:
        print(f"error: {error}")
        code = 2
    except SystemExit as error:
        code = error.code if error.code in (0, 2) else 4
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def fuzz(kind: str, cases: int, seed: int, place: int = 0) -> dict:
    """{outcomes: {outcome: how many}, growth, seconds, failure}, failure being the smallest case
    found that ended otherwise than ALLOWED, with its output, or ""."""
    global OWN
    target, since = TARGETS[kind], time.monotonic()
    counts, most, failure, seeds = Counter(), 0, "", []
    odd_inputs.bomb()  # once, in the parent of all cases
    bar = tqdm(total=cases, desc=kind, unit="case", position=place)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch, contextlib.chdir(scratch):
        OWN = isolated(lambda: "correct").memory
        if target.prepare:
            seeds = [Path(scratch, "seeds")]
            seeds[0].mkdir()
            ended = isolated(lambda: target.prepare(seeds[0]) or "correct")
            if ended.outcome != "correct":
                raise UserError(f"{kind}: what all cases need failed.\n{ended.said}")

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=cases, deadline=None, database=None, print_blob=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(target.cases)
        def every(case):
            nonlocal failure, most
            with tempfile.TemporaryDirectory(prefix="case-", dir=scratch) as folder:
                os.environ["HF_HOME"] = folder
                datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
                ended = isolated(lambda: target.run(case, Path(folder), *seeds))
            if not failure:  # what follows a failure are smaller cases of the same
                counts[ended.outcome] += 1
                bar.update()
            most = max(most, ended.memory - OWN)
            if ended.outcome not in ALLOWED:
                failure = f"{ended.outcome}: {case}\n{ended.said[-3000:]}"
                raise AssertionError(ended.outcome)

        with contextlib.suppress(AssertionError), contextlib.redirect_stdout(io.StringIO()):
            every()
    bar.close()
    seconds = time.monotonic() - since
    found = {"outcomes": dict(counts), "growth": most, "seconds": seconds}
    return found | {"failure": failure}


def report(found: dict[str, dict], seed: int) -> str:
    """The section of docs/reliability.md."""
    columns = ("correct", "sentence", "mismatch", "traceback", "hang", "memory")
    lines = [
        [kind, *(f"{one['outcomes'].get(c, 0):,}" for c in columns), f"{one['growth'] / 2**10:.0f}"]
        for kind, one in found.items()
    ]
    total = sum(sum(one["outcomes"].values()) for one in found.values())
    seconds = sum(one["seconds"] for one in found.values())
    head = ["inputs", *columns, "peak memory, MiB"]
    return (
        f"```\npython -m lab.fuzz --seed {seed}\n```\n\n"
        f"{date.today()}, {os.cpu_count()} cores ({platform.machine()}), no GPU, {seconds:.0f} s "
        f"of processes. {total:,} inputs, drawn by hypothesis:\n\n"
        f"{tables.markdown(head, lines)}\n"
        "`correct`: the work was done, and pairs, scores or weights are those of an independent "
        "reading. `sentence`: refused in one sentence. Memory is what a case took beyond Python "
        "and the libraries.\n"
    )


def main(argv: list[str] | None = None):
    args = parse(argv)
    kinds = args.kinds or list(KINDS)
    with reported("lab.fuzz"):
        cases = [(k, args.cases or KINDS[k], args.seed, i) for i, k in enumerate(kinds)]
        fork = multiprocessing.get_context("fork")
        with fork.Pool(min(len(kinds), len(os.sched_getaffinity(0)))) as pool:
            found = dict(zip(kinds, pool.starmap(fuzz, cases, chunksize=1), strict=True))
        text = report(found, args.seed)
        if args.report:
            write_section(args.report, "Damaged and odd inputs", text)
        print(f"\n{text}")
        for kind, one in found.items():
            if one["failure"]:
                raise UserError(f"{kind} failed.\n{one['failure']}")


if __name__ == "__main__":
    main()
