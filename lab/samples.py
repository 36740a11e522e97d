"""Draw every caption of the toy once, and save the pictures as one.

python -m lab.samples --model assets/tiny-sdxl
"""

import argparse
from pathlib import Path

from system.program import Parser, reported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.samples", __doc__)
    add = parser.add_argument
    add("--model", default="tiny", metavar="PATH", help="the pipeline that draws")
    add("--out", type=Path, default=Path("out/samples.png"), metavar="FILE", help="the picture")
    add("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import numpy as np

import model
import toy
from evaluation import figures
from weights import loading


def main(argv: list[str] | None = None):
    args, captions = parse(argv), toy.prompts()
    with reported("lab.samples"):
        pipeline = loading.load_pipeline(args.model)
        seeds = [args.seed + k for k in range(len(captions))]
        images = model.sample(pipeline, captions, seeds, 25, 2.0, progress="samples")
    right = [toy.faithfulness(*pair) for pair in zip(images, captions, strict=True)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [images[i : i + 12] for i in range(0, len(images), 12)]  # a colour each
    figures.grid(rows, list(toy.HUES)).save(args.out)
    print(f"Wrote {args.out}; {np.mean(right):.1%} show the colour and the shape of their caption.")


if __name__ == "__main__":
    main()
