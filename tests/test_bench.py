"""lab/bench.py: what it times is the step it names, and its arithmetic. Nothing about times."""

import pytest
import torch

import model
from lab import bench


def run(*argv):
    return bench.main([*map(str, argv), "--repeats", "1", "--micro-batch", "1"])


@pytest.mark.parametrize("name, parameters", [("sdxl", 2_567_463_684), ("sd15", 859_520_964)])
def test_configurations_are_the_published_unets(name, parameters):
    assert model.count_parameters(bench.CONFIGS[name]) == parameters


def test_counted_flops_are_those_of_the_design():
    assert bench.call_flops(bench.CONFIGS["sd15"]) == pytest.approx(803e9, rel=1e-3)


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_report_has_every_row_command_and_projection(checkpoint, kind, tmp_path, capsys):
    out = tmp_path / "bench.md"
    rows = run("--model", checkpoint(kind), "--inversion-steps", 2, "--out", out)
    page = out.read_text()
    assert capsys.readouterr().out.strip().endswith(page.strip())
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [row.name for row in rows]
    assert len(rows) == 6 and all(len(row.seconds) == 1 for row in rows)
    assert f"python -m lab.bench --model {checkpoint(kind)}" in page
    assert torch.__version__ in page and "CPU-hours" in page and "not a measurement" in page
    assert "TFLOP/s |" not in page  # no GPU, no such column


def test_rows_make_the_calls_they_claim(checkpoint, monkeypatch):
    calls, true = [], model.predict_noise

    def counted(unet, *rest):
        calls.append(torch.is_grad_enabled())
        return true(unet, *rest)

    monkeypatch.setattr(model, "predict_noise", counted)
    args = bench.parse(["--inversion-steps", "4", "--micro-batch", "1"])
    policy = bench.build(bench.read_config(str(checkpoint())), "cpu", torch.float32)
    for row in bench.rows_of(args, policy):
        made = []
        for cell in range(4):
            calls.clear()
            row.action(cell)
            made.append(len(calls) + 2 * sum(calls))  # a backward is two
            if "inversion" in row.name:
                assert len(calls) == cell + 1
        assert sum(made) / 4 == row.work


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_adamw_step_moves_the_policy_alone(checkpoint, dtype):
    args = bench.parse(["--inversion-steps", "1", "--micro-batch", "1"])
    policy = bench.build(bench.read_config(str(checkpoint())), "cpu", bench.DTYPES[dtype])
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    rows = bench.rows_of(args, policy)
    rows[4].action(0)
    assert all(torch.equal(before[name], weight) for name, weight in policy.named_parameters())
    rows[5].action(0)
    assert not all(torch.equal(before[name], weight) for name, weight in policy.named_parameters())
    assert {weight.dtype for weight in policy.parameters()} == {bench.DTYPES[dtype]}
    assert all(weight.grad is None for weight in policy.parameters())


def test_projection_is_the_recipe_at_the_measured_pace():
    assert bench.device_hours(seconds=3.6, pairs=4) == pytest.approx(102.4)  # 102,400 x 3.6 s


def test_table_of_a_gpu_states_rate_peak_memory_and_what_did_not_fit():
    rows = [bench.Row(f"row {i}", work, None) for i, work in enumerate((1, 3, 3, 5.5, 9.5, 9.5))]
    for row in rows:
        row.seconds, row.memory = [2 * row.work, row.work, row.work / 2], 3 * 2**30
    rows[1].seconds = None
    heads, _, call, lost, *_, step, _ = bench.table(rows, 8, 1e12, peak_tflops=16).splitlines()
    assert heads.split("|")[8:11] == [" TFLOP/s ", " of peak ", " peak GiB "]
    assert [cell.strip() for cell in call.split("|")[2:-1]] == [
        "1", "0.5-2", "8", "1.00", "1", "10.5%", "8", "50.0%", "3.00",
    ]  # fmt: skip
    assert "out of memory" in lost and "9.50" in step and "100.0%" in step


def test_out_of_memory_costs_a_row_not_the_run(checkpoint):
    def fails(cell):
        raise torch.OutOfMemoryError

    policy = bench.build(bench.read_config(str(checkpoint())), "cpu", torch.float32)
    rows = [bench.Row("fits", 1, lambda cell: None), bench.Row("fails", 3, fails)]
    bench.measure(rows, policy, 2, warmup=1, repeats=2)
    assert len(rows[0].seconds) == 2 and rows[1].seconds is None


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--model", "sdx"], "sdx"),
        (["--model", "sd15", "--inversion-steps", "7"], "--inversion-steps 7"),
        (["--model", "sd15", "--micro-batch", "0"], "--micro-batch"),
        (["--model", "sd15", "--warmup-repeats", "0"], "--warmup-repeats"),
        (["--model", "sd15", "--eta", "2"], "--eta 2"),
        (["--model", "sd15", "--peak-tflops", "-1"], "--peak-tflops"),
        (["--model", "sd15", "--out", "nowhere/bench.md"], "nowhere"),
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
    assert stop.value.code == 2 and "takes more than 51 GB of memory" in error and "17;" in error
