"""The one file that lab/real.py leaves: report.zip, with nothing in it that names its user.

    report.md      what was expected, what came out, and what a difference means
    report.json    the same, and all that it was made of
    metrics.jsonl  a line per step, as docs/run.md says; numbers alone
    log.txt        the end of what a program said, where one failed
    curves.png     those lines; samples.png, pictures.png: of the run, and before and after

Folders, the machine's name, its user and tokens are replaced in every text, see `nameless`.
"""

import getpass
import json
import os
import re
import socket
import zipfile
from pathlib import Path
from statistics import median

from evaluation import own, tables
from evaluation.prompts import PUBLISHED, TOYS
from evaluation.published import TITLES
from lab.expected import Row, outside
from system.files import ROOT, replacing, write
from system.hub import PRESETS
from system.text import markdown, printable

REPORT = "report.zip"
LOG_LINES = 200
NEVER_RUN = (
    "When this program was written it had **not yet been run on SDXL or SD1.5**: the ranges are "
    "computed, published by others, or measured on the tiny model of this repository, as the last "
    "column says. A value outside may mean that the range is wrong."
)

# -------------------------------------------------------------------------------------------------
# Nothing that names a user.


def nameless(text: str, secret: list[str] = ()) -> str:
    """The text without folders, tokens of the hub, the names of user and machine, and `secret`."""
    folders = {str(Path.home()), str(Path.cwd()), str(ROOT)} - {"/", "/root"}
    rest = r"[^\s/\"'`,;:()|]"  # of a path
    for word in sorted({*filter(None, secret), *folders}, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)(?:/{rest}*)*", "PATH", text)
    text = re.sub(rf"(?<![\w.:/])(?:~|\.{{1,2}})?(?:/{rest}+)+/?", "PATH", text)
    text = re.sub(r"\b[A-Za-z]:\\[^\s\"']+", "PATH", text)
    text = re.sub(r"\bhf_\w{8,}", "TOKEN", text)
    for word in sorted(names(), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "NAME", text)
    return text


def names() -> set[str]:
    """Of the user and the machine. "root" and "localhost" name nobody."""
    found = {socket.gethostname(), socket.gethostname().split(".")[0], Path.home().name}
    found |= {os.environ.get(key, "") for key in ("USER", "LOGNAME", "HF_TOKEN", "WANDB_API_KEY")}
    try:
        found.add(getpass.getuser())
    except (KeyError, OSError):  # a user without a name, as in containers
        pass
    return {word for word in found if len(word) > 2} - {"root", "localhost"}


def judge(name: str) -> str:
    return "a function of the user's own" if own.is_own(name) else name


def settings(given: dict) -> tuple[dict, list[str]]:
    """(the settings as they may be told, names that may not): presets, ids of the hub and published
    sets keep their names, what lies on the user's disk does not."""
    told, secret = dict(given), []
    for key in ("model", "data", "prompts"):
        known, copied, path = given[key].partition("=")  # parti=PATH
        published = known in {*PRESETS, *PUBLISHED, *TOYS}
        if copied or (not published and os.path.exists(os.path.expanduser(given[key]))):
            secret.append(path or given[key])
            told[key] = known if copied else "the user's own"
    secret += [name.rpartition(":")[0] for name in given["scorers"] if own.is_own(name)]
    told["scorers"] = ", ".join(map(judge, given["scorers"]))
    return told, secret


# -------------------------------------------------------------------------------------------------
# The report.


def table(rows: list[Row]) -> str:
    heads = ["", "expected", "came out", "inside?", "where the range comes from"]
    cells = [[row.what, row.range(), row.value(), row.verdict(), row.why] for row in rows]
    return tables.markdown(heads, cells)


def summary(rows: list[Row], failed: str = "") -> str:
    """The first sentences."""
    known, wrong = [row for row in rows if row.inside is not None], outside(rows)
    said = f"**It did not finish**: {markdown(failed)}\n\n" if failed else ""
    if not known:
        return f"{said}Nothing was measured."
    if not wrong:
        return f"{said}All {len(known)} values that could be judged are inside their ranges."
    listed = "\n".join(f"- {row.words()}" for row in wrong)
    return f"{said}{len(wrong)} of {len(known)} values are outside their ranges:\n\n{listed}"


def win_rates(records: list[dict]) -> str:
    rows = [
        [
            TITLES.get(one["scorer"], one["scorer"]),
            f"{one['rate']:.1%} [{one['low']:.1%}, {one['high']:.1%}]",
            f"{one['ties']}",
            f"{one['n']}",
        ]
        for one in records
    ]
    return tables.markdown(["judge", "wins over the start", "ties", "pictures"], rows)


def score_changes(records: list[dict]) -> str:
    rows = []
    for one in records:
        change = [one[key] for key in ("change", "change_low", "change_high")]
        if None not in change:
            middle, low, high = (f"{x:+.4g}" for x in change)
            title = TITLES.get(one["scorer"], one["scorer"])
            rows.append([title, f"{one['mean']:.4g}", f"{middle} [{low}, {high}]"])
    return tables.markdown(["judge", "mean", "change from the start"], rows)


def measured(lines: list[dict], cost: dict) -> str:
    """What a run measured of itself: speed, memory, and where it ended."""
    lines = [line for line in lines if line.get("loss") is not None]
    if not lines:
        return ""
    late, rest = lines[len(lines) // 2 :], lines[1:] or lines  # the first step warms up

    def middle(some: list[dict], key: str, form: str) -> str:
        found = [line[key] for line in some if line.get(key) is not None]
        return form.format(median(found)) if found else ""

    peak = cost.get("peak_memory")
    rows = {
        "seconds of a step, median": middle(rest, "seconds", "{:.2f}"),
        "pairs/s, median": middle(rest, "pairs_per_second", "{:.3f}"),
        "peak memory, GiB (of the process, on a CPU)": f"{peak / 2**30:.2f}" if peak else "",
        "gradient norm, median": middle(lines, "grad_norm", "{:.4g}"),
        "margin, median of the second half": middle(late, "margin", "{:.4g}"),
        "winner's reward, the same": middle(late, "reward_winner", "{:.4g}"),
        "loser's reward, the same": middle(late, "reward_loser", "{:.4g}"),
    }
    return tables.markdown(["", ""], [[key, value] for key, value in rows.items() if value])


def render(about: dict, rows: list[Row], lines: list[dict], pictures: list[str]) -> str:
    """report.md. about: report.json but for its rows; lines: of metrics.jsonl."""
    settings = [[key, str(value)] for key, value in about["settings"].items()]
    own, packages = about["machine"], about["machine"].get("packages", {})
    bytes_of = {"memory", "free"}
    here = [
        [key, f"{value / 2**30:.1f} GiB" if key in bytes_of else f"{value:.3g}"]
        if isinstance(value, float) or key in bytes_of
        else [key, str(value)]
        for key, value in own.items()
        if key != "packages"
    ]
    spent = [[phase, f"{seconds / 60:.1f}"] for phase, seconds in about["seconds"].items()]
    parts = {
        "Expected, and what came out": f"{NEVER_RUN}\n\n{table(rows)}",
        "Measured": measured(lines, about["cost"]),
        "Judged": "\n".join(
            part
            for part in (
                win_rates(about["win_rates"]) if about["win_rates"] else "",
                score_changes(about["scores"]) if about["scores"] else "",
            )
            if part
        ),
        "The run": "\n".join(
            [tables.markdown(["", ""], settings), tables.markdown(["phase", "minutes"], spent)]
        ),
        "The machine": tables.markdown(["", ""], [*here, *map(list, packages.items())]),
        "Pictures": "\n\n".join(f"![{name}]({name})" for name in pictures),
    }
    body = "\n\n".join(f"## {name}\n\n{text.strip()}" for name, text in parts.items() if text)
    head = f"# DDIM-InPO on real weights\n\n{summary(rows, about['failed'])}"
    return f"{head}\n\n{body}\n"


def pack(
    out: Path,
    about: dict,
    rows: list[Row],
    lines: list[dict],
    pictures: dict[str, Path],
    secret: list[str],
    log: str = "",
) -> Path:
    """Write report.zip, and report.md beside it. pictures: {name in the zip: file}; secret: words
    that name something of the user's; log: what a program said that failed."""
    pictures = {name: file for name, file in pictures.items() if file.is_file()}
    listed = [
        {"what": row.what, "low": row.low, "high": row.high, "found": row.found, "why": row.why}
        for row in rows
    ]
    texts = {
        "report.md": render(about, rows, lines, [*pictures]),
        "report.json": json.dumps(about | {"rows": listed}, indent=2) + "\n",
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
    }
    if log:
        texts["log.txt"] = "\n".join(re.split(r"[\r\n]+", log)[-LOG_LINES:]) + "\n"
    texts = {name: nameless(printable(text, "\n"), secret) for name, text in texts.items()}
    with replacing(out / REPORT) as scratch, zipfile.ZipFile(scratch, "w") as file:
        for name, text in texts.items():
            file.writestr(entry(name), text, zipfile.ZIP_DEFLATED)
        for name, picture in pictures.items():
            file.writestr(entry(name), picture.read_bytes())
    write(out / "report.md", texts["report.md"])
    return out / REPORT


def entry(name: str) -> zipfile.ZipInfo:
    """Of a file that everybody may read, without a date."""
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o644 << 16
    return info
