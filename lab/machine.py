"""What this machine is, as JSON: versions, the GPU, and how fast a large product runs on it.

    python -m lab.machine

Nothing here names its user, the machine or a folder. lab/real.py asks it in a process of its own,
which takes no memory of the GPU once it has ended.
"""

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

from system.program import Parser

PACKAGES = "torch diffusers transformers deepspeed peft datasets huggingface_hub safetensors"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return Parser("lab.machine", __doc__).parse_args(argv)


def about() -> dict:
    """{system, python, packages, cores, device, and of a GPU: memory, free (bytes), driver, cuda,
    capability, bf16, rate (FLOP/s of a large product in bf16)}."""
    import torch

    from lab.bench import product_rate

    found = {"system": platform.system(), "python": platform.python_version()}
    found |= {"packages": versions(), "cores": len(os.sched_getaffinity(0)), "device": "CPU"}
    if not torch.cuda.is_available():
        return found
    free, total = torch.cuda.mem_get_info()
    found |= {"device": torch.cuda.get_device_name(), "memory": total, "free": free}
    found |= {"driver": driver(), "cuda": torch.version.cuda}
    found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    found["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    if found["bf16"]:
        rates = [product_rate(torch.device("cuda"), torch.bfloat16) for _ in range(3)]
        found["rate"] = max(rates)  # the first ones warm up
    return found


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES.split():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def driver() -> str:
    """Of NVIDIA, "unknown" where its program is not there."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return said[0] if said else "unknown"


if __name__ == "__main__":
    parse()
    print(json.dumps(about()))
