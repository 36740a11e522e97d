"""lab/scale.py: bytes as in real steps on two ranks, times as counted by hand."""

import json

import pytest
from launch import start

from lab import scale
from lab.scale import Collective, Layout
from system import hub
from training import budget

# -------------------------------------------------------------------------------------------------
# Traffic, against what PyTorch's dispatcher sees of torch.distributed in real steps.

COUNTED = """
import json, os, sys
from collections import defaultdict
from types import SimpleNamespace
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
import train_inpo
from training import plan, run

plan.get_accelerator = lambda: SimpleNamespace(device_name=lambda: "cuda")  # bf16, as on a GPU
KINDS = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather"}
KINDS |= {"_reduce_scatter_base_": "reduce-scatter"}
seen, steps, log = defaultdict(lambda: [0, 0]), [], run.Run.log

class Traffic(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and (kind := KINDS.get(func.__name__.split(".")[0])):
            whole = max(x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            if kind != "all-reduce" or whole > 100:  # no norms and metrics
                seen[kind][0] += whole
                seen[kind][1] += 1
        return func(*args, **(kwargs or {}))

def logged(*args):
    log(*args)
    steps.append(dict(seen))
    seen.clear()

run.Run.log = logged
with Traffic():
    train_inpo.main(sys.argv[1:])
print("COUNTED", json.dumps(steps[-1]))  # the first step also has the start's
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage, checkpointing", [(1, True), (2, True), (3, True), (3, False)])
def test_collectives_are_those_of_a_real_step(stage, checkpointing, argv, ds_config, checkpoint):
    base, config = checkpoint(channels=(16,)), ds_config(stage)
    words = argv(
        model=base, ds_config=config, batch=8, micro_batch=2, inversion_spacing="log-sigma",
        inversion_steps=3,
    )  # fmt: skip
    words.append(f"--{'' if checkpointing else 'no-'}gradient-checkpointing")
    ranks = start(words, 2, COUNTED)
    said = ["".join(rank.communicate()) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    unet = scale.layout(hub.read_config(str(base), "unet"))
    assert 0 < unet.recomputed < unet.parameters
    if not checkpointing:
        unet = unet._replace(recomputed=0, recomputed_modules=0)
    wanted = scale.collectives(stage, json.loads(config.read_text()), unet, calls=3, accumulation=2)
    wanted = {one.kind: [one.bytes, one.calls] for one in wanted}
    for text in said:
        counted = json.loads(text.split("COUNTED ")[1].splitlines()[0])
        assert counted.keys() == wanted.keys()
        for kind, (size, calls) in counted.items():
            assert calls == wanted[kind][1]
            assert wanted[kind][0] <= size <= 1.001 * wanted[kind][0]  # with padding


def test_a_cheaper_communication_type_and_more_micro_steps_count():
    unet, config = Layout(1000, 10, 900, 8), {"zero_optimization": {"reduce_bucket_size": 400}}
    half = scale.collectives(2, config, unet, 5.5, 4)
    full = scale.collectives(2, config | {"communication_data_type": "fp32"}, unet, 5.5, 4)
    assert half == [Collective("all-reduce", 8000, 12), Collective("all-gather", 2000, 1)]
    assert full[0].bytes == 16000
    gathers = scale.collectives(3, config, unet, 5.5, 4)[0]
    assert gathers.bytes == 4 * 2 * (8.5 * 1000 + 900)
    assert gathers.calls == 4 * (10 + 10 + 8 + 6.5)  # one of all, backward, recomputed, ahead


# -------------------------------------------------------------------------------------------------
# Times, against counts by hand.


@pytest.mark.parametrize(
    "pairs, gpus, micro, found",
    [
        (1024, 8, 4, (4, 32)),
        (1024, 256, 4, (4, 1)),
        (1024, 512, 4, (2, 1)),
        (1024, 64, 16, (16, 1)),
    ],
)
def test_the_batch_stays_and_the_micro_batch_shrinks(pairs, gpus, micro, found):
    assert scale.batches(pairs, gpus, micro) == found
    assert found[0] * found[1] * gpus == pairs


def test_rings_move_what_a_simulated_ring_moves():
    """Each rank sends a chunk to the next one, until all have the sum, or all of the chunks."""
    n = 6
    have = [[{rank} for _ in range(n)] for rank in range(n)]  # have[rank][chunk]: summed ranks
    sent = 0
    for hop in range(n - 1):
        moves = [(r, (r - hop) % n, set(have[r][(r - hop) % n])) for r in range(n)]
        for r, chunk, what in moves:
            have[(r + 1) % n][chunk] |= what
        sent += 1  # chunk of 1/n, by each rank
    assert all(have[r][(r + 1) % n] == set(range(n)) for r in range(n))
    assert scale.passes("reduce-scatter", n) == pytest.approx(sent / n)
    for hop in range(n - 1):
        moves = [(r, (r + 1 - hop) % n) for r in range(n)]
        for r, chunk in moves:
            have[(r + 1) % n][chunk] = have[r][chunk]
        sent += 1
    assert all(chunk == set(range(n)) for row in have for chunk in row)
    assert scale.passes("all-reduce", n) == pytest.approx(sent / n)


def test_seconds_by_hand():
    many = [Collective("all-reduce", 4e9, 2), Collective("all-gather", 1e9, 1)]
    wire = 2 * 7 / 8 * 4e9 + 7 / 8 * 1e9
    assert scale.sent(many, 8) == wire
    assert scale.seconds(many, 8, 12.5e9, latency=False) == pytest.approx(wire / 450e9)  # NVLink
    late = 2 * (8.4 + 14 * 3.4) + (8.4 + 7 * 3.4)  # microseconds: Simple, as all are large
    assert scale.seconds(many, 8, 12.5e9) == pytest.approx(wire / 450e9 + late * 1e-6)
    wire = 2 * 15 / 16 * 4e9 + 15 / 16 * 1e9
    assert scale.seconds(many, 16, 12.5e9, latency=False) == pytest.approx(wire / 12.5e9)
    late = 2 * (8.4 + 28 * 3.4 + 2 * 9.6) + (8.4 + 14 * 3.4 + 9.6)  # two nodes: one hop between
    assert scale.seconds(many, 16, 12.5e9) == pytest.approx(wire / 12.5e9 + late * 1e-6)
    assert scale.seconds(many, 16, 800e9, latency=False) == pytest.approx(wire / 450e9)


def test_a_small_message_takes_the_protocol_of_low_latency():
    small = [Collective("all-gather", 8000.0, 10)]
    wire = 7 / 8 * 800 / 450e9 / 0.25
    assert scale.seconds(small, 8, 1e9) == pytest.approx(10 * (wire + (3.6 + 7 * 0.47) * 1e-6))


def test_flops_are_the_hours_of_an_h200_that_were_counted_apart():
    """The recipe at 55 % of 790 TFLOP/s: 2 x (9.5 x 6.761 + 4.879) TFLOP a pair, and 7 calls."""
    for path, unet_calls, hours in zip(scale.PATHS, (9.5, 7), (36.2, 27.4), strict=True):
        flops = scale.pair_flops("sdxl", scale.inverting(path))
        assert flops == pytest.approx(2 * (unet_calls * 6.761e12 + 4.879e12), rel=2e-3)
        assert 409_600 * flops / (0.55 * 790e12) / 3600 == pytest.approx(hours, rel=5e-3)
        step = scale.Step("sdxl", path, 8)
        assert 400 * 8 * step.compute(0.55) / 3600 == pytest.approx(hours, rel=5e-3)


def test_bounds_hold_the_larger_part_and_the_sum():
    step = scale.Step("sd15", "the paper's path", 16)
    for stage in (1, 2, 3):
        compute, network = step.compute(), step.network(stage, "Ethernet")
        assert step.bounds(stage, "Ethernet") == (max(compute, network), compute + network)


def test_layout_counts_what_the_published_unets_have():
    unet = scale.layout(scale.CONFIGS["sdxl"])
    assert unet.parameters == 2_567_463_684
    assert (
        0.5 < unet.recomputed / unet.parameters < 1 and 0 < unet.recomputed_modules < unet.modules
    )
    assert budget.PREFETCH == 5 * 10**7


# -------------------------------------------------------------------------------------------------
# The section.


def test_the_section_says_that_nothing_was_measured_and_has_every_size(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "GPUS", (8, 512))
    page = tmp_path / "speed.md"
    page.write_text("# Speed\n\n## Another\n\nkept\n")
    scale.main([f"--report={page}"])
    text = page.read_text()
    assert "Computed, not measured" in text and "kept" in text
    rows = [line for line in text.splitlines() if line.startswith("| 512 |")]
    assert len(rows) == 2 * 2 + 2 and all("2 x 1" in row for row in rows[:4])
    assert (tmp_path / "scale.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "value, text", [(0.0806, "0.0806"), (7, "7.00"), (54.12, "54.1"), (579.6, "580")]
)
def test_three_digits(value, text):
    assert scale.digits(value) == text


def test_a_report_without_a_folder_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        scale.main(["--report=nowhere/speed.md"])
    assert stop.value.code == 2
    sentence = (
        "lab.scale: error: --report nowhere/speed.md: must be a file in a folder that exists.\n"
    )
    assert capsys.readouterr().err == sentence
