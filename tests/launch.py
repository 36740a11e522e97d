"""Ranks as a launcher starts them: forked from a server that has imported the project.

Starting Python with torch, deepspeed and diffusers takes 8 s of a core, forking takes 0.05 s. A
rank has its own environment, arguments, output and exit code, as the launcher gives them. It
differs in two ways: its sets have the order of the other ranks' (one hash seed), and it ends
without Python's last clean-up. Therefore one test of test_train.py goes through the real launcher.
"""

import atexit
import gc
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

import evaluate  # noqa: F401 - for the server, which has what this file imports
import train_inpo  # noqa: F401
from system.files import ROOT
from training import run

# DeepSpeed refuses fp16 where oneDNN has no fast kernels for it; torch computes it everywhere.
CPU_Accelerator.is_fp16_supported = lambda self: True

# Drawing curves takes a third of a short run. The tests about curves.png put figures back.
run.figures = SimpleNamespace(curves=lambda lines, path, *rest: path.touch())

gc.freeze()  # DeepSpeed collects garbage at each start, of all that was imported

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    ["launch", "datasets", "torch.utils.tensorboard", "torch._inductor.compile_fx"]  # slow ones
    + ["deepspeed.module_inject.auto_ep_layer", "deepspeed.ops.triton_ops"]
)
running: list["Rank"] = []


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


class Rank:
    """A process that runs a file of the project, or code if `program` is not named *.py.

    It is used like a subprocess.Popen. env: added to the environment of this process."""

    def __init__(self, program: str, argv: list, env: dict[str, str]):
        self.folder = tempfile.TemporaryDirectory(prefix="rank-")
        self.files = [Path(self.folder.name, name) for name in ("out", "err")]
        given = program, [str(word) for word in argv], os.environ | env, self.files
        self.process = server.Process(target=_run, args=given)
        before = dict(os.environ)
        os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"  # of the server, if it starts now
        self.process.start()
        os.environ.clear()
        os.environ |= before
        running.append(self)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int):
        if self.returncode is None:
            os.kill(self.process.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)
        self.process.join()

    def said(self) -> list[str]:
        """What it has printed up to now, on stdout and on stderr; without torch 2.9's "[Gloo]"."""
        said = [file.read_text() if file.exists() else "" for file in self.files]
        return [re.sub(r"^\[Gloo\] Rank .*\n", "", text, flags=re.MULTILINE) for text in said]

    def communicate(self, timeout: float = 300) -> list[str]:
        """What it has printed when it has ended."""
        self.process.join(timeout)
        if late := self.returncode is None:
            self.kill()
        running.remove(self)
        if late:
            raise subprocess.TimeoutExpired("a rank", timeout, *self.said())
        return self.said()


def _run(program: str, argv: list[str], env: dict[str, str], files: list[Path]):
    os.environ.clear()
    os.environ |= env
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(ROOT)
    try:
        if program.endswith(".py"):
            sys.argv = [str(ROOT / program), *argv]
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            sys.argv = ["-c", *argv]
            exec(program, {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # multiprocessing would not


def start(argv: list, ranks: int, program: str = "train_inpo.py", **env: str) -> list[Rank]:
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
    return [Rank(program, argv, {"RANK": str(r), "LOCAL_RANK": str(r)} | env) for r in range(ranks)]


def launch(argv: list, ranks: int, program: str = "train_inpo.py", code: int = 0) -> list[str]:
    """What each rank printed; all must end with this exit code."""
    said = []
    for rank in start(argv, ranks, program):
        said.append("".join(rank.communicate()))
        assert rank.returncode == code, said[-1][-3000:]
    return said
