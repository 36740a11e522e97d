"""The processes of one job: they join, agree, print and stop together.

    join()              become one group, or say who is missing and why
    agree(facts)        compare what must be the same everywhere, and name the first difference
    shares_folder(out)  check that every rank sees the files that rank 0 writes
    with Stop() as stop: ... if stop.asked(): save    a signal to one rank stops all at one step

A rank is a process, one per GPU; ranks are numbered from 0 over all nodes. A function that is
marked collective has to be called by all of them, and raises or returns the same on all.
docs/nodes.md tells users about it.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from importlib.metadata import version
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from system.files import ROOT, UserError
from system.text import printable

# -------------------------------------------------------------------------------------------------
# Printing. It works before join(), too.


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def is_main() -> bool:
    return rank() == 0


def print0(*words, file=None):
    if is_main():
        print(*(printable(str(word), kept="\n") for word in words), file=file, flush=True)


def spans(ranks: Sequence[int]) -> str:
    """Ascending numbers in short form: [0, 1, 2, 5] is "0-2, 5"."""
    first = [r for r in ranks if r - 1 not in ranks]
    last = [r for r in ranks if r + 1 not in ranks]
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(first, last, strict=True))


def excerpt(text: str, other: str, width: int = 60) -> str:
    """At most `width` characters of `text`, from shortly before it differs from `other`."""
    start = max(0, min(len(commonprefix([text, other])) - width // 3, len(text) - width))
    before = "..." if start > 0 else ""
    after = "..." if start + width < len(text) else ""
    return before + text[start : start + width] + after


# -------------------------------------------------------------------------------------------------
# Joining.

FORMING = timedelta(minutes=5)  # to form a group: all ranks have come, but one may end meanwhile


def join(timeout: float = 600.0):
    """Join the launcher's process group (deepspeed, torchrun, srun); plain `python` is a group of
    one. timeout: seconds for all ranks to come. Raises UserError."""
    import deepspeed

    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    # On a CPU DeepSpeed would compile its own all-reduce; gloo's needs no C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    store = None
    if os.environ["MASTER_PORT"] != "0" and not dist.is_initialized():
        store = roll_call(timeout)
    # torch's rendezvous uses rank 0's server again (multi_tenant), so `store` is kept until then.
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    del store
    for group in (cpu_group, patient_group):
        if group.cache_info().currsize == 0:
            # gloo's threads abort a process that ends beside them, now and then (torch 2.13).
            atexit.register(dist.destroy_process_group, group())


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The launcher's ranks are one group over gloo, without DeepSpeed, until the end of the block;
    plain `python`, and ranks that have joined before, stay as they are. Raises UserError."""
    if world() == 1 or dist.is_initialized():
        yield
        return
    store = roll_call(timeout=600.0)
    dist.init_process_group("gloo", timeout=FORMING)
    del store  # the group has taken it up
    try:
        yield
    finally:
        dist.destroy_process_group()
        for group in (cpu_group, patient_group):
            group.cache_clear()


def roll_call(timeout: float) -> dist.Store:
    """The launcher's store, once all ranks of this job, and of no other job, have connected."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    host, end = socket.gethostname(), time.monotonic() + timeout
    me = f"rank {rank} ({host})"
    store = open_store(rank, me, place, timeout)
    keys = dist.PrefixStore("ranks", store)

    def wait_for(key: str, patience: float = 0.0) -> str:
        while not keys.check([key]):  # get() would wait as well, but prints C++ traces
            if time.monotonic() > end + patience:
                raise UserError(
                    f"{me} reached {place}, but heard nothing from rank 0 there within "
                    f"{timeout:.0f} s; look at what rank 0 printed, or take another --master_port."
                )
            time.sleep(0.1)
        return keys.get(key).decode()

    try:
        # The port may be another job's, whose store must stay as it is: compare before writing.
        words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
        mine = f"{shlex.join([Path(sys.argv[0]).name, *words])} on {world} rank(s)"
        first = rank == 0
        theirs = keys.compare_set("command", "", mine).decode() if first else wait_for("command")
        if theirs != mine:
            raise UserError(
                f"{me} was started as `{excerpt(mine, theirs)}` and met `{excerpt(theirs, mine)}` "
                f"at {place}; start the same command on every node, or if that is another run, "
                "choose another --master_port."
            )
        if keys.add(f"came/{rank}", 1) > 1:
            raise UserError(
                f"{me} is the second rank {rank} at {place}; if another run is there, choose "
                "another --master_port; otherwise give each node its own --node_rank."
            )
        keys.set(f"host/{rank}", host)
        if first:
            wait_for_ranks(keys, world, place, timeout)
        elif said := wait_for("verdict", patience=10.0):  # rank 0 may have started later
            raise UserError(said)
    except dist.DistError as error:
        raise UserError(
            f"{me} lost rank 0 at {place} before all ranks had come; look at what rank 0 printed."
        ) from error
    return store


def open_store(rank: int, me: str, place: str, timeout: float) -> dist.TCPStore:
    """Serve the store on rank 0, or under torchrun in its agent; all others connect to it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serve = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    end = time.monotonic() + timeout
    while not serve:  # a plain socket first, since TCPStore prints C++ traces while it tries
        try:
            socket.create_connection((address, port), timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"{me} cannot reach rank 0 at {place} within {timeout:.0f} s "
                    f"({error.strerror or error}); is it running, is --master_addr its address, "
                    "and does a firewall close the port?"
                ) from error
            time.sleep(0.5)
    try:
        return dist.TCPStore(
            address, port, None, serve, timedelta(seconds=timeout),
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {port} of this machine ({socket.gethostname()}) is in use, perhaps by "
                f"another run; choose another one: deepspeed --master_port {port + 1} ..."
            ) from error
        raise UserError(
            f"{me} found no store of a job at {place}; is --master_addr the address of rank 0's "
            "machine, and the port not another program's?"
        ) from error


def wait_for_ranks(keys: dist.Store, world: int, place: str, timeout: float):
    """On rank 0: wait until all have written their host, or say who is missing."""
    start, hosts, missing = time.monotonic(), {}, list(range(world))
    next_print = 20.0
    while missing:
        for rank in [r for r in missing if keys.check([f"host/{r}"])]:
            missing.remove(rank)
            hosts.setdefault(keys.get(f"host/{rank}").decode(), []).append(rank)
        waited = time.monotonic() - start
        here = "; ".join(f"{spans(sorted(ranks))} on {host}" for host, ranks in hosts.items())
        if missing and waited > timeout:
            said = (
                f"rank(s) {spans(missing)} of {world} did not come to {place} within "
                f"{timeout:.0f} s (here: {here}); look at what their nodes printed, and whether "
                "--master_addr and the port can be reached from there."
            )
            keys.set("verdict", said)
            time.sleep(1)  # the others read it from this process
            raise UserError(said)
        if missing and waited > next_print:
            print0(
                f"Waiting for rank(s) {spans(missing)} of {world} ({waited:.0f} s; here: {here})."
            )
            next_print += 30.0
        if missing:
            time.sleep(0.1)
    keys.set("verdict", "")


# -------------------------------------------------------------------------------------------------
# Agreeing.


@functools.cache
def cpu_group():
    """All ranks over gloo, so that no CPU has to wait for its GPU (collective)."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


@functools.cache
def patient_group():
    """All ranks over gloo, for what one rank may do for hours while the others wait: download the
    data, convert a checkpoint. If a rank ends, the others see the broken connection at once; a rank
    that hangs is noticed by any_rank and NCCL, which do not wait as long (collective)."""
    group = dist.new_group(backend="gloo", timeout=FORMING)  # until then nothing tells of an end
    dist.distributed_c10d._set_pg_timeout(timedelta(days=7), group)
    return group


def gather(value: Any) -> list:
    """The values of all ranks, by rank; of a process that has not joined, its own (collective).

    Waits up to 7 days, as do first, together, on_main and share."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=patient_group())
    return values


def first(words: str | None) -> str | None:
    """The lowest rank's text that is not empty, or None (collective)."""
    return next((said for said in gather(words) if said), None)


def together(action: Callable) -> Any:
    """action() on every rank; a UserError, an OSError or too little GPU memory on one of them is a
    UserError on all (collective)."""
    result = said = None
    try:
        result = action()
    except (UserError, OSError) as error:
        said = str(error) or type(error).__name__
    except torch.OutOfMemoryError:
        said = "the GPU's memory is too small; free some, or take a larger one."
    if said := first(said):
        raise UserError(said)
    return result


def on_main(action: Callable) -> Any:
    """action() on rank 0 alone, its result on all ranks; its UserError or OSError becomes a
    UserError on all (collective)."""
    return share(together(lambda: action() if is_main() else None))


def share(value: Any) -> Any:
    """Rank 0's value on all ranks (collective)."""
    return gather(value)[0]


def any_rank(value: int) -> int:
    """The maximum over ranks of a small int (collective)."""
    most = torch.tensor(value)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=cpu_group())
    return int(most)


def agree(facts: dict[str, Any]):
    """Raises UserError on every rank if the ranks' `facts`, as JSON text, differ (collective)."""
    texts = {key: json.dumps(value, sort_keys=True, default=str) for key, value in facts.items()}
    everyone = gather((socket.gethostname(), texts))
    host, first = everyone[0]
    for rank, (odd_host, odd) in enumerate(everyone):
        for key in [*first, *(key for key in odd if key not in first)]:
            a, b = first.get(key, "nothing"), odd.get(key, "nothing")
            if a != b:
                raise UserError(
                    f"rank {rank} ({odd_host}) has {key} {excerpt(b, a)}, rank 0 ({host}) has "
                    f"{excerpt(a, b)}; start the same command with the same code and data on every "
                    "node."
                )


def code_version(root: Path = ROOT) -> str:
    """12 hex digits of the .py files that a run imports and of the libraries' versions."""
    digest = hashlib.sha256()
    folders = ("", "training", "evaluation", "sources", "weights", "system")
    for file in sorted(file for folder in folders for file in (root / folder).glob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    for package in ("torch", "deepspeed", "diffusers"):
        digest.update(version(package).encode() + b"\0")
    return digest.hexdigest()[:12]


def shares_folder(folder: Path, patience: float = 10.0):
    """Raises UserError unless all ranks see what rank 0 writes into `folder` (collective).

    patience: seconds for a network file system to show it."""
    token, problem = folder / f".shared-{os.urandom(6).hex()}", None
    if is_main():
        try:
            token.touch()
        except OSError as error:
            problem = error.strerror
    name, problem = gather((token.name, problem))[0]
    host = gather(socket.gethostname())
    if problem:
        raise UserError(f"rank 0 ({host[0]}) cannot write to {folder} ({problem}); mend --out.")
    end = time.monotonic() + patience
    while not (seen := (folder / name).exists()) and time.monotonic() < end:
        time.sleep(0.1)
    blind = [rank for rank, saw in enumerate(gather(seen)) if not saw]
    if is_main():
        token.unlink()
    if blind:
        raise UserError(
            f"rank {blind[0]} ({host[blind[0]]}) does not see {folder} that rank 0 ({host[0]}) "
            "writes to; put --out on a file system that all nodes share."
        )


# -------------------------------------------------------------------------------------------------
# Stopping.


class Stop:
    """SIGTERM, SIGINT and SIGHUP ask the job to stop, whichever rank they reach; a second SIGINT
    interrupts at once. A SIGHUP, of a terminal that is closed, is ignored under nohup.

    DeepSpeed's launch.py passes a SIGTERM to one rank, and to the next when that one has ended, so
    the ranks have to tell each other. It kills a rank 30 s after its signal. The `deepspeed`
    command around it (runner.py) passes signals on with pdsh only: see docs/nodes.md."""

    def __enter__(self):
        self.got, self.before = [], {}
        if threading.current_thread() is threading.main_thread():  # else Python refuses
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame):
        if number == signal.SIGINT and number in self.got:
            raise KeyboardInterrupt
        self.got.append(number)

    def asked(self) -> int:
        """The number of a signal that any rank got, or 0 (collective)."""
        return any_rank(self.got[0] if self.got else 0)
