"""lab/bench.py and lab/architectures.py: what is timed is the step it names, and the arithmetic.
Nothing about times."""

import copy
import json
from argparse import Namespace

import pytest
import torch

import model
from lab import architectures, bench, steps
from training import lora
from weights import loading

CPU = torch.device("cpu")


@pytest.mark.parametrize("name, parameters", [("sdxl", 2_567_463_684), ("sd15", 859_520_964)])
def test_configurations_are_the_published_unets(name, parameters):
    assert loading.count_parameters(architectures.CONFIGS[name]) == parameters


@pytest.mark.parametrize(
    "part, parameters", [(architectures.CLIP_L, 123_060_480), (architectures.BIG_G, 694_659_840)]
)
def test_configurations_are_the_published_text_encoders(part, parameters):
    config = architectures.CLIPTextConfig(**part, vocab_size=49408)
    projects = part is architectures.BIG_G
    kind = "CLIPTextModelWithProjection" if projects else "CLIPTextModel"
    with torch.device("meta"):
        encoder = getattr(architectures, kind)(config)
    assert sum(weight.numel() for weight in encoder.parameters()) == parameters


def test_counted_flops_are_those_of_the_design():
    assert bench.call_flops(architectures.CONFIGS["sd15"]) == pytest.approx(803e9, rel=1e-3)


@pytest.fixture(scope="module")
def pipelines():
    return {kind: architectures.build(f"{kind}-small") for kind in ("sdxl", "sd15")}


def asked(*argv) -> Namespace:
    args = bench.parse([*map(str, argv), "--micro-batch", "2"])
    args.dtype = args.dtype or "fp32"
    return args


def variants(pipelines, *argv, kind="sd15"):
    unet = copy.deepcopy(pipelines[kind].unet)
    return {v.name: v for v in steps.variants_of(asked(*argv), "sd15-small", unet)}


def step(variant, pipeline, cell=0):
    pixels = torch.randint(0, 256, (2 * variant.pairs, 3, 64, 64), dtype=torch.uint8)
    clock = steps.Clock(CPU)
    steps.micro_step(variant, pipeline, pixels, ["a red circle"] * variant.pairs, cell, clock)
    return clock.parts


@pytest.mark.parametrize("flags, trained", [((), 3), (("--lora-rank", 2), 2)])
def test_variants_make_the_calls_they_claim(pipelines, monkeypatch, flags, trained):
    calls, weight = [], torch.ones((), requires_grad=True)

    def counted(unet, x, *rest):
        calls.extend([torch.is_grad_enabled()] * len(x))
        return x * weight

    monkeypatch.setattr(model, "predict_noise", counted)
    expected = {"released": 6.4 + 1 + 3, "uniform": 5.5 + 1 + trained}
    expected |= {"log-sigma": 4 + 1 + trained, "log-sigma, 2 calls": 2 + 1 + trained}
    for name, variant in variants(pipelines, *flags).items():
        calls.clear()
        for cell in range(10):
            step(variant, pipelines["sd15"], cell)
        made = len(calls) + (2 if name == "released" else trained - 1) * sum(calls)
        assert made / (2 * variant.pairs * 10) == expected[name] == sum(variant.calls().values())


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_every_variant_trains_its_policy_alone(pipelines, kind):
    for variant in variants(pipelines, kind=kind).values():
        parts = step(variant, pipelines[kind])
        assert {part for part, seconds in parts.items() if seconds} == {*steps.PARTS} - {
            "optimizer"
        }
        assert all(weight.grad is not None for weight in variant.policy.parameters())
        assert all(weight.grad is None for weight in variant.reference.parameters())


def test_an_inversion_counts_as_on_average_over_t(pipelines, monkeypatch):
    def takes_a_second_a_call(variant, pipeline, pixels, captions, cell, clock):
        clock.parts["inversion"] += steps.inversion_calls(variant.settings, [cell])[0]
        clock.parts["forward"] += 1

    monkeypatch.setattr(steps, "micro_step", takes_a_second_a_call)
    means = {"released": 6.4, "uniform": 5.5, "log-sigma": 4, "log-sigma, 2 calls": 2}
    for name, variant in variants(pipelines).items():
        steps.timed(variant, None, torch.zeros(1), [])
        (parts,) = variant.parts
        assert parts["inversion"] == pytest.approx(means[name] / variant.pairs)
        assert parts["forward"] == 1 / variant.pairs


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_adamw_moves_the_policy_and_keeps_its_dtype(pipelines, dtype):
    policy = variants(pipelines, "--dtype", dtype)["uniform"].policy
    before = [weight.clone() for weight in policy.parameters()]
    for weight in policy.parameters():
        weight.grad = torch.ones_like(weight)
    take = steps.adamw(list(policy.parameters()))
    take()
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert {weight.dtype for weight in policy.parameters()} == {steps.DTYPES[dtype]}


def test_an_optimizer_step_is_shared_by_the_pairs_of_an_update(pipelines, monkeypatch):
    every = [*variants(pipelines).values()]
    for variant in every:
        variant.parts = [dict.fromkeys(steps.PARTS, 0.0), dict.fromkeys(steps.PARTS, 0.0)]
    moments = iter(range(100))
    monkeypatch.setattr(steps.time, "perf_counter", lambda: float(next(moments)))
    steps.time_optimizers(every, pairs=4)
    assert all(parts["optimizer"] == 1 / 4 for v in every for parts in v.parts)


@pytest.mark.slow
def test_report_json_and_picture_say_what_was_found(tmp_path, pipelines, capsys):
    report, out = tmp_path / "speed.md", tmp_path / "out"
    report.write_text("# Speed\n\n## Other\n\nkept\n")
    argv = ["--model", "sd15-small", "--repeats", "2", "--micro-batch", "2", "--out", str(out)]
    (found,) = bench.main([*argv, "--report", str(report)])
    page = report.read_text()
    assert "kept" in page and "## A training step of sd15-small on a CPU: fp32\n" in page
    assert f"python -m lab.bench {' '.join(argv)}" in page and torch.__version__ in page
    lines = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    ours = [cell.strip() for cell in lines[4]]
    assert ours[:3] == ["log-sigma", "2", "8"]
    (one,) = json.loads((out / "speed.json").read_text())
    seconds = {v["name"]: [sum(p.values()) for p in v["parts"]] for v in one["variants"]}
    ratios = [a / b for a, b in zip(seconds["released"], seconds["log-sigma"], strict=True)]
    assert ours[4] == f"{sum(ratios) / 2:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    assert (out / "speed.png").stat().st_size > 1000
    assert f"Look at {out / 'speed.png'}." in capsys.readouterr().out


def test_share_of_the_product_is_needed_work_over_time_and_rate(pipelines):
    (variant,) = [v for v in variants(pipelines).values() if v.name == "log-sigma"]
    variant.parts = [{"forward": 2.0}, {"forward": 4.0}]
    rates = {torch.float32: [100.0, 10.0]}
    found = bench.Found("x", CPU, [variant], 0.1, {"encoders": 6.0, "call": 3.0}, rates)
    work = 6 + 2 * 8 * 3  # of a pair
    assert found.shares(variant) == [work / 2 / 100, work / 4 / 10]
    assert found.ratios(variant, variant) == [1, 1]


def test_waiting_is_what_reading_takes_beyond_the_step(pipelines):
    every = [*variants(pipelines).values()]
    for k, variant in enumerate(every):
        variant.parts = [dict.fromkeys(steps.PARTS, 1.0 + k)]  # the first one is the fastest: 6 s
    rates = {torch.float32: [1e12]}
    flops = {"encoders": 1.0, "call": 1.0}
    cases = {6.0: "0% would be waiting", 24.0: "75% would be waiting with one worker, 0% with"}
    cases |= {96.0: "94% would be waiting with one worker, 50% with eight"}
    for data_seconds, said in cases.items():
        found = bench.Found("x", CPU, every, data_seconds, flops, rates)
        assert said in bench.section(asked(), [], found)


def test_out_of_memory_costs_a_variant_not_the_run(pipelines, monkeypatch):
    every = variants(pipelines)

    def fails(variant, *_):
        if variant.name == "uniform":
            raise torch.OutOfMemoryError
        return true(variant, *_)

    true = steps.micro_step
    monkeypatch.setattr(steps, "micro_step", fails)
    pixels = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    for variant in every.values():
        n = variant.pairs
        steps.timed(variant, pipelines["sd15"], pixels[: 2 * n], ["a"] * n)
    assert [v.failed for v in every.values()] == [False, True, False, False]
    rates = {torch.float32: [1e12]}
    found = bench.Found("x", CPU, [*every.values()], 0.1, {"encoders": 1.0, "call": 1.0}, rates)
    text = bench.section(asked(), [], found)
    assert text.count("out of memory") == 2 and "| log-sigma | 2 | 8 |" in text
    assert lora.attached(every["uniform"].policy) is False


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--model", "sdx"], "sdx"),
        (["--model", "mid", "--micro-batch", "0"], "--micro-batch"),
        (["--model", "mid", "--repeats", "0"], "--repeats"),
        (["--model", "mid", "--report", "nowhere/speed.md"], "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(argv, named, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and named in error and "\n" not in error


def test_a_model_that_a_cpu_cannot_hold_is_refused_before_it_is_built(monkeypatch, capsys):
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench.os, "sysconf", lambda name: 2**17)  # 16 GB
    with pytest.raises(SystemExit) as stop:
        bench.main(["--model", "sdxl"])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "takes more than 72 GB of memory" in error and "17;" in error
