"""Laws of the processes of a job, over 127.0.0.1 and between two network namespaces."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from launch import Rank, free_port, launch, start

from system import processes
from system.files import ROOT, UserError
from system.program import lost_peer, reported

# -------------------------------------------------------------------------------------------------
# Two ranks that meet.

TOGETHER = """
import json, os, signal, sys, time
from pathlib import Path
from system import processes
from system.files import UserError
from system.program import lost_peer

processes.join(timeout=120)
rank, shared = int(os.environ["RANK"]), Path(sys.argv[1])
said = {}

def tell(name, call, *args):
    try:
        said[name] = call(*args)
    except UserError as error:
        said[name] = f"UserError: {error}"

tell("max", processes.any_rank, [7, 3][rank])
tell("agree", processes.agree, {"flags": {"a": 1, "b": rank // 2}, "code": "x"})
tell("differ", processes.agree, {"same": 1, "data": "0" * 500 + str(rank), "also": rank})
tell("lack", processes.agree, {"same": 1} | ({"seed": 5} if rank else {}))
tell("shared", processes.shares_folder, shared)
(shared / str(rank)).mkdir()
tell("unshared", processes.shares_folder, shared / str(rank), 0.2)
tell("unwritable", processes.shares_folder, shared / "nowhere", 0.2)
said["left"] = [p.name for p in shared.rglob(".*")]
with processes.Stop() as stop:
    tell("quiet", stop.asked)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    tell("stop", stop.asked)
print(json.dumps(said), flush=True)
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    while True:
        processes.any_rank(0)
except RuntimeError as error:
    print(json.dumps({"lost": lost_peer(error), "text": str(error)}))
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    """What each of two ranks was told, and rank 0 also after rank 1 was killed."""
    pair = start([tmp_path_factory.mktemp("shared")], 2, TOGETHER)
    outputs = [child.communicate() for child in pair]
    lines = [
        [json.loads(line) for line in out.splitlines() if line[0] == "{"] for out, _ in outputs
    ]
    assert [len(told) for told in lines] == [2, 1], outputs
    assert [child.returncode for child in pair] == [0, -signal.SIGKILL], outputs
    return [lines[0][0] | lines[0][1], lines[1][0]]


def test_any_rank_is_the_maximum(together):
    assert [told["max"] for told in together] == [7, 7]


def test_equal_facts_pass_and_different_ones_raise_the_same_on_all_ranks(together):
    assert [told["agree"] for told in together] == [None, None]
    host = socket.gethostname()
    for name, words in {
        "differ": [f"rank 1 ({host}) has data ...0", '01",', f"rank 0 ({host}) has"],
        "lack": ["rank 1", "has seed 5", "has nothing"],
    }.items():
        one, two = (told[name] for told in together)
        assert one == two and one.startswith("UserError: ") and len(one) < 300
        assert all(word in one for word in words), one
    assert "also" not in together[0]["differ"]  # the first difference is the one to mend


def test_a_folder_must_be_seen_by_all_ranks_and_is_left_clean(together):
    assert [told["shared"] for told in together] == [None, None]
    assert [told["left"] for told in together] == [[], []]
    for name, words in {
        "unshared": ["rank 1", "does not see", "--out"],
        "unwritable": ["rank 0", "cannot write", "nowhere", "No such file"],
    }.items():
        for told in together:
            assert told[name].startswith("UserError: "), told[name]
            assert all(word in told[name] for word in words), told[name]


def test_a_signal_to_one_rank_asks_all(together):
    assert [told["quiet"] for told in together] == [0, 0]
    assert [told["stop"] for told in together] == [signal.SIGTERM, signal.SIGTERM]


def test_a_killed_rank_is_recognized_by_the_others(together):
    assert together[0]["lost"], together[0]["text"]


def test_other_errors_are_no_lost_peer():
    for error in (ConnectionResetError("Connection reset by peer"), RuntimeError("out of memory")):
        assert not lost_peer(error)
    timed_out = "[tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"
    assert lost_peer(RuntimeError(timed_out))
    aborted = "NCCL communicator was aborted on rank 2."
    assert lost_peer(dist.DistBackendError(aborted))
    assert not lost_peer(dist.DistBackendError("NCCL error: invalid usage"))


PATIENT = """
import functools, json, os, sys, time
from datetime import timedelta
import deepspeed
from system import processes
from system.program import lost_peer

deepspeed.init_distributed = functools.partial(  # in place of 10 minutes
    deepspeed.init_distributed, timeout=timedelta(seconds=2)
)
processes.join(timeout=120)
rank = int(os.environ["RANK"])
said = {"together": processes.together(lambda: time.sleep(0 if rank else 3) or rank)}
said["on_main"] = processes.on_main(lambda: time.sleep(3))
print(json.dumps(said), flush=True)
try:
    time.sleep(0 if rank else 3)
    processes.any_rank(0)
except RuntimeError as error:
    print(json.dumps({"lost": lost_peer(error)}), flush=True)
os._exit(0)
"""


def test_ranks_wait_for_what_rank_0_does_alone_but_not_for_one_that_hangs_in_a_step():
    outputs = [child.communicate() for child in start([], 2, PATIENT)]
    for rank, (out, err) in enumerate(outputs):
        lines = [json.loads(line) for line in out.splitlines() if line[0] == "{"]
        assert lines == [{"together": rank, "on_main": None}, {"lost": True}], err[-3000:]


DYING = """
import os, signal, sys
import train_inpo

if os.environ["RANK"] == "0":
    train_inpo.check = lambda args: os.kill(os.getpid(), signal.SIGKILL)
train_inpo.main(sys.argv[1:])
"""


def test_a_rank_that_dies_during_the_checks_ends_the_others_with_a_sentence(argv):
    pair = start(argv(), 2, DYING)
    (_, _), (_, said) = [child.communicate() for child in pair]
    assert [child.returncode for child in pair] == [-signal.SIGKILL, 1], said[-3000:]
    assert "train_inpo.py: error: rank 1: another rank is gone" in said
    assert "Traceback" not in said


# -------------------------------------------------------------------------------------------------
# Ranks that do not.

MEET = """
import sys
from system import processes
from system.files import UserError
try:
    processes.roll_call(float(sys.argv[1]))
    print("met")
except UserError as error:
    print(f"UserError: {error}")
"""


def test_two_jobs_on_one_port_do_not_mix_and_a_missing_rank_is_named():
    """A job of 3 ranks lacks rank 2; ranks of another one, and a double, come to its port."""
    port, patience, others, jobs = int(free_port()), 4, 60, []
    for rank, wait in ((0, patience), (1, patience), (0, others), (1, others), (1, patience)):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
        jobs.append(Rank(MEET, [wait], place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        while jobs[1:] == []:  # until the first job has its port
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.01)
    said = [child.communicate()[0].strip() for child in jobs]
    lacks, _, occupied, met, _ = said
    assert lacks.startswith(f"UserError: rank(s) 2 of 3 did not come to 127.0.0.1:{port} within")
    assert f"here: 0-1 on {socket.gethostname()}" in lacks
    assert f"port {port} of this machine" in occupied and f"--master_port {port + 1}" in occupied
    assert met.startswith("UserError: rank 1 (") and "--master_port" in met
    assert f"{others} on 3 rank(s)` and met" in met and f"{patience} on 3 rank(s)" in met
    # Of the two that came as rank 1 either may be the first; the second is turned away.
    first, second = sorted([said[1], said[4]], key=lambda words: "second" in words)
    assert first == lacks and "is the second rank 1 at" in second


@pytest.fixture
def place(monkeypatch):
    """place(rank, world) -> port: the environment that a launcher gives, in this process."""

    def set_place(rank: int, world: int) -> int:
        port = int(free_port())
        values = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        for name, value in (values | {"MASTER_PORT": port}).items():
            monkeypatch.setenv(name, str(value))
        return port

    return set_place


def test_a_rank_that_cannot_reach_rank_0_says_where_and_why(place, monkeypatch):
    port = place(3, 4)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(UserError) as sentence:
        processes.join(0.2)
    for word in ("rank 3 (", f"127.0.0.1:{port}", "Connection refused", "--master_addr"):
        assert word in str(sentence.value)


def test_a_port_that_another_program_has_is_named_with_the_fix(place):
    port = place(0, 1)
    with socket.create_server(("", port)):
        with pytest.raises(UserError, match=f"port {port} .*in use.*--master_port {port + 1}"):
            processes.roll_call(1)


def test_rank_0_tells_whom_it_waits_for_after_20_s_and_every_30(place, monkeypatch, capsys):
    place(0, 8)
    now, hour = time.monotonic(), iter(range(10**6))
    clock = SimpleNamespace(monotonic=lambda: now + next(hour) / 10, sleep=lambda _: None)
    monkeypatch.setattr(processes, "time", clock)
    with pytest.raises(UserError, match=r"rank\(s\) 1-7 of 8"):
        processes.roll_call(100)
    lines = capsys.readouterr().out.splitlines()
    assert [line[: line.index(";")] for line in lines] == [
        f"Waiting for rank(s) 1-7 of 8 ({seconds} s" for seconds in (20, 50, 80)
    ]


# -------------------------------------------------------------------------------------------------
# One rank.


ALONE = """
import os, sys
from pathlib import Path
from system import processes

for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    del os.environ[name]
assert processes.gather(3) == [3] and processes.world() == 1 and processes.is_main()
for _ in range(2):  # as two runs in one process do
    processes.join()
assert (processes.dist.get_rank(), processes.dist.get_world_size()) == (0, 1)
assert processes.any_rank(5) == 5
processes.agree({"a": Path()})
processes.shares_folder(Path(sys.argv[1]))
"""


def test_a_group_of_one_needs_no_launcher(tmp_path):
    launch([tmp_path], 1, ALONE)
    assert list(tmp_path.iterdir()) == []


def test_stop_notes_signals_raises_at_the_second_interrupt_and_restores_the_handlers():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with processes.Stop() as stop:
        assert stop.asked() == 0
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # as the launcher sends after a Ctrl-C
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_closed_terminal_asks_to_stop_but_not_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with processes.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked() == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a program
        with processes.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked() == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stop_in_another_thread_leaves_the_handlers_alone():
    seen, before = [], signal.getsignal(signal.SIGTERM)

    def body():
        with processes.Stop() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.asked()))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]


# -------------------------------------------------------------------------------------------------
# What the code is, and what a reader sees.


def test_code_version_follows_the_code_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("a = 1")
    first = processes.code_version(tmp_path)
    (tmp_path / "notes.md").write_text("")
    assert processes.code_version(tmp_path) == first and len(first) == 12 and int(first, 16)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    renamed = processes.code_version(tmp_path)
    (tmp_path / "b.py").write_text("a = 2")
    changed = processes.code_version(tmp_path)
    monkeypatch.setattr(processes, "version", lambda package: "0")
    assert len({first, renamed, changed, processes.code_version(tmp_path)}) == 4


def test_numbers_of_ranks_are_shortened():
    assert processes.spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and processes.spans([]) == ""


def test_an_excerpt_shows_the_difference():
    a, b = "x" * 300 + "1" + "y" * 300, "x" * 300 + "2" + "y" * 300
    assert "x1y" in processes.excerpt(a, b) and "x2y" in processes.excerpt(b, a)
    assert len(processes.excerpt(a, b)) == 66 and processes.excerpt("short", "other") == "short"


def test_a_node_speaks_once(monkeypatch, capsys):
    for rank, local in ((0, 0), (1, 1), (2, 0), (3, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        processes.print0("job", rank)
        with pytest.raises(SystemExit) as stop, reported("a program"):
            raise UserError(f"wrong on {rank}.")
        assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == "job 0\n"
    assert said.err == "a program: error: wrong on 0.\na program: error: wrong on 2.\n"


# -------------------------------------------------------------------------------------------------
# Many nodes.


@pytest.mark.slow
def test_two_network_namespaces_make_one_group(tmp_path):
    probe = f"probe-{os.getpid()}"
    made = shutil.which("ip") and subprocess.run(
        ["ip", "netns", "add", probe], capture_output=True
    ).returncode == 0  # fmt: skip
    if not made:
        pytest.skip("no network namespaces here (they need Linux, iproute2 and root)")
    subprocess.run(["ip", "netns", "del", probe], check=True)
    program = tmp_path / "hello.py"
    program.write_text(
        "import os, socket\n"
        "from system import processes\n"
        "processes.join(timeout=120)\n"
        "hosts = processes.gather(socket.gethostname())\n"
        "processes.print0(*hosts, processes.any_rank(int(os.environ['RANK'])))"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    clean |= {"PATH": f"{Path(sys.executable).parent}:{clean['PATH']}", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [str(ROOT / "docs" / "two_nodes.sh"), str(program)],
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = child.communicate(timeout=200)
    assert child.returncode == 0, err[-3000:]
    assert "node-a node-b 1" in out.splitlines()
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"rehearsal-{child.pid}-" not in left


def test_the_slurm_script_lets_the_ranks_save_before_it_requeues(tmp_path):
    """SLURM is played by shell scripts: srun starts two ranks and passes signals on to them."""
    for name, body in {
        "srun": "while [[ $1 == --* ]]; do shift; done; trap 'kill $ranks' TERM; for i in 0 1; do "
        'SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" & ranks+=" $!"; done; wait; wait',
        "python": "trap 'sleep 0.3; echo saved; exit' TERM; "
        'echo $RANK $LOCAL_RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT "$@"; '
        "for i in {1..300}; do sleep 0.1; done",
        "scontrol": "[ $1 = show ] && echo node-{7..9} | tr ' ' '\\n' || echo $@",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node-[7-9]"}
    child = subprocess.Popen(
        ["bash", str(ROOT / "docs" / "slurm.sh"), "--model", "sdxl"],
        env=os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = sorted(child.stdout.readline() for _ in range(2))
    assert lines == [
        f"{r} {r} of 2 at node-7:20017 -u train_inpo.py --model sdxl\n" for r in (0, 1)
    ]
    child.terminate()
    assert child.communicate(timeout=60)[0].splitlines() == ["saved", "saved", "requeue 17"]
    assert child.returncode == 0


def test_a_mistake_of_another_rank_is_raised_on_this_one(monkeypatch):
    monkeypatch.setattr(processes, "first", lambda said: said or "the other's file is missing.")
    with pytest.raises(UserError, match="the other's file is missing"):
        processes.together(lambda: "mine is there")
