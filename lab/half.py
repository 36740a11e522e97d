"""train_inpo.py in half precision on a CPU, where it takes fp32: half precision only pays on a GPU.

    python -m lab.half bf16 --model tiny --out out/bf16     # ds_config.json as on a GPU
    python -m lab.half fp16 --model tiny --out out/fp16     # configs/fp16.json

For the numbers, not for speed. DeepSpeed refuses fp16 on processors without fast kernels for it;
torch computes it on all of them, slowly, so here it is allowed."""

import argparse
import sys
from types import SimpleNamespace

from system.files import ROOT
from system.program import Parser

CONFIGS = {"bf16": ROOT / "ds_config.json", "fp16": ROOT / "configs" / "fp16.json"}


def parse(argv: list[str] | None = None) -> tuple[str, list[str]]:
    parser = Parser("lab.half", __doc__)
    more = {"nargs": argparse.REMAINDER, "metavar": "FLAG ...", "help": "of train_inpo.py"}
    parser.add_argument("precision", choices=CONFIGS, help="of the UNets")
    parser.add_argument("flags", **more)
    args = parser.parse_args(argv)
    return args.precision, args.flags


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

import train_inpo
from training import plan


def main(argv: list[str] | None = None):
    precision, flags = parse(argv)
    plan.get_accelerator = lambda: SimpleNamespace(device_name=lambda: "half precision is kept")
    CPU_Accelerator.is_fp16_supported = lambda self: True
    train_inpo.main([*flags, "--ds-config", str(CONFIGS[precision])])


if __name__ == "__main__":
    main(sys.argv[1:])
