"""Prepare preference pairs: look at them, convert them, make them, say how clear they are.

    python pairs.py look mine                             # counts, broken pairs, a contact sheet
    python pairs.py check mine --out rejected.jsonl       # read everything, list what is broken
    python pairs.py convert mine --out pairs.parquet      # one file of training's own columns
    python pairs.py make --model sdxl --prompts prompts.txt --judge pickscore --out mine.parquet
    torchrun --nproc_per_node 8 pairs.py make --model out/sdxl-inpo --prompts prompts.txt \\
                       --per-prompt 8 --judge pickscore hps --out second.parquet
    python pairs.py score liuhuohuo2/pick-a-pic-v2 --judge pickscore --out weighed.parquet

What convert, make and score write is a parquet file of pairs, for --data of train_inpo.py. The same
make or score again continues an interrupted one, on any number of GPUs, to the same file; a changed
one is refused where it would mix with what is there."""

import argparse
from pathlib import Path

from evaluation import own
from evaluation.published import TITLES
from system.files import UserError
from system.hub import add_model_flags, check_local, say_of_files
from system.program import Parser, finite, reported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Raises UserError for wrong flags."""
    parser = Parser("pairs.py", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (said, add_flags) in COMMANDS.items():
        add_flags(commands.add_parser(name, help=said.split(": ")[0], description=said))
    args = parser.parse_args(argv)
    if args.command == "make":
        check_make(args)
    return args


# --------------------------------------------------------------------------------------------------
# look, check, convert

LOOK = "say what some pairs hold, and draw a few of them"
CHECK = "read all pairs, and list those that training would leave out"
CONVERT = "write the pairs that can be read as one parquet file, in training's own columns"


def add_look(parser: argparse.ArgumentParser):
    # fmt: off
    add = parser.add_argument
    add_source(add)
    add("--sample", type=int, default=256, metavar="N", help="pairs to read, at random")
    add("--seed", type=int, default=0, help="of which they are")
    add_reading(add)
    add("--out", type=Path, default=Path("pairs.png"), metavar="FILE", help="the contact sheet")
    # fmt: on


def add_check(parser: argparse.ArgumentParser):
    # fmt: off
    add_source(parser.add_argument)
    add_reading(parser.add_argument)
    parser.add_argument("--out", type=Path, default=Path("rejected.jsonl"), metavar="FILE",
        help="list of {file, row, reason}")
    # fmt: on


def add_convert(parser: argparse.ArgumentParser):
    add_source(parser.add_argument)
    add_out(parser.add_argument)


def add_source(add):
    # fmt: off
    add("source", metavar="PAIRS", help="what train_inpo.py takes as --data")
    add("--split", default="train", metavar="NAME", help="of a hub id or DatasetDict")
    add("--columns", nargs="+", default=[], metavar="ROLE=NAME",
        help="which columns hold a pair, see train_inpo.py")
    # fmt: on


def add_reading(add):
    # fmt: off
    add("--workers", type=int, default=0, metavar="N", help="processes that read")
    add("--model", default="sdxl", help="whose tokenizer counts the captions' tokens")
    # fmt: on


def add_out(add):
    add("--out", type=Path, required=True, metavar="FILE", help="*.parquet, to be written")


# --------------------------------------------------------------------------------------------------
# make

MAKE = """draw pictures, judge them, pair best and worst: of --per-prompt pictures of a prompt those
two that all judges rank alike and that lie farthest apart for the first one; no pair where there
are none.

F.parquet has jpg_0, jpg_1 (PNG), label_0, caption; strength: the first judge's probability that the
winner is preferred, 0.5 to 1 (not of aesthetic, clip and faithfulness, which give none);
margin_JUDGE: by how much the winner scores higher; seed_0, seed_1; model. F.pictures keeps all
pictures and scores."""


def add_make(parser: argparse.ArgumentParser):
    # fmt: off
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL",
        help="that draws: sdxl, sd15, tiny, folder or hub id of a pipeline, UNet or LoRA, or a "
             "single .safetensors file")
    add("--base", metavar="MODEL", help="pipeline of a UNet or LoRA")
    add_model_flags(add)
    add("--prompts", required=True, metavar="SET",
        help="toy-train, a .txt file, a prompt a line, or another set of evaluate.py's --prompts")
    add("--limit", type=int, metavar="N", help="take N prompts, evenly spaced (default: all)")
    add("--per-prompt", type=int, default=4, metavar="N",
        help="pictures of which one pair is chosen")
    add("--rounds", type=int, default=1, metavar="N",
        help="pairs of each prompt, each from pictures of its own")
    add("--judge", nargs="+", required=True, type=own.choice(*TITLES), metavar="JUDGE",
        help=f"one or more of {', '.join(TITLES)} and FILE.py:FUNCTION (docs/judges.md): all must "
             "agree, the first one's margin counts")
    add_places(add)
    add("--first-seed", type=int, default=1_000_000, metavar="N",
        help="seed of the first picture, the next ones count up, and of the side that a winner "
             "stands on; evaluate.py's count from 0")
    add("--steps", type=int, metavar="N",
        help="sampling steps per picture (default: tiny 12, others 50)")
    add("--guidance", type=float, metavar="W",
        help="classifier-free guidance scale, 1 = none (default: tiny 2, SDXL 5, SD1.5 7.5)")
    add("--batch", type=int, metavar="N",
        help="pictures per call of the model (default: SDXL 4, others 16)")
    # fmt: on


def check_make(args: argparse.Namespace):
    least = {"per_prompt": 2, "rounds": 1, "limit": 1, "first_seed": 0, "steps": 1}
    for option, low in (least | {"guidance": 1, "batch": 1}).items():
        if getattr(args, option) is not None and getattr(args, option) < low:
            raise UserError(f"--{option.replace('_', '-')} must be at least {low}.")
    args.judge = own.distinct(args.judge)
    for path in filter(None, (args.model, args.base)):
        check_local(path)
    say_of_files(filter(None, (args.model, args.base)), args)


# --------------------------------------------------------------------------------------------------
# score

SCORE = """say how clearly a judge prefers each winner: a copy of the pairs, without ties and broken
ones, and with the column strength.

strength is the judge's probability that the labelled winner is preferred, 0 to 1; where it is below
0.5 judge and label disagree. F.broken.jsonl lists pairs that cannot be read."""


def add_score(parser: argparse.ArgumentParser):
    # fmt: off
    add = parser.add_argument
    add_source(add)
    add("--judge", required=True, type=own.choice(*TITLES), metavar="JUDGE",
        help="that gives a probability: pickscore, hps, hps-v2.0, the toy's preference, or "
             "FILE.py:FUNCTION that has log_odds (docs/judges.md); with --log-odds any")
    add("--log-odds", type=above_zero, metavar="K",
        help="strength is sigmoid(K x margin of the scores), in place of the judge's own K, which "
             "is 1 for pickscore; SmPO's release has 0.06 (docs/objectives.md)")
    add_places(add)
    # fmt: on


def above_zero(text: str) -> float:
    if (value := finite(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0.")
    return value


def add_places(add):
    # fmt: off
    add("--scorer-folder", type=Path, metavar="FOLDER",
        help="copies of the judges' hub repositories, as FOLDER/owner/name (default: the hub)")
    add_out(add)
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    # fmt: on


# --------------------------------------------------------------------------------------------------

COMMANDS = {
    "look": (LOOK, add_look),
    "check": (CHECK, add_check),
    "convert": (CONVERT, add_convert),
    "make": (MAKE, add_make),
    "score": (SCORE, add_score),
}


def main(argv: list[str] | None = None):
    with reported("pairs.py"):
        args = parse(argv)
        from preparing import look, make, score  # here, since that takes seconds

        calls = {"look": look.look, "check": look.check, "convert": look.convert}
        calls |= {"make": make.run, "score": score.run}
        calls[args.command](args)


if __name__ == "__main__":
    main()
