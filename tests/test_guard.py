"""Laws of guard.py: what is said of which metrics, and when a run with non-finite steps stops."""

import json
import math
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param

from loss import inpo_loss, kto_loss
from system.files import UserError
from training import guard
from training.guard import GROWTH, STREAK, WINDOW, NonFiniteSteps, Watch

# -------------------------------------------------------------------------------------------------
# Watch.


def healthy(step: int, **values) -> dict:
    line = {"step": step, "loss": 0.6, "implicit_accuracy": 0.75, "margin": 0.2, "err_winner": 0.1}
    line |= {"err_loser": 0.1, "err_ref_winner": 0.1, "err_ref_loser": 0.1, "grad_norm": 1.0}
    return line | values


def said(lines) -> list[tuple[int, str]]:
    """(step, sentence) of everything that is said of these lines."""
    watch = Watch()
    return [(line["step"], text) for line in lines for text in watch(line)]


def test_a_healthy_run_and_one_without_a_reference_are_left_in_peace():
    assert said(healthy(i) for i in range(1, 100)) == []
    assert said({"step": i, "loss": 0.0, "err_winner": 9.0} for i in range(1, 100)) == []
    assert said(healthy(i, implicit_accuracy=0.5, margin=0.01) for i in range(1, 99)) == []


@pytest.mark.parametrize("objective, more", [(inpo_loss, ()), (kto_loss, (None, torch.zeros(())))])
def test_saturated_pairs_are_named_at_once_and_only_once(objective, more):
    err = torch.tensor([0.1, 0.1, 0.3, 0.3])
    losses, line = objective(err, torch.full((4,), 0.2), 1e4, *more)
    line = {key: float(value) for key, value in line.items()}
    line |= {"step": 7, "loss": float(losses.mean())}
    [(step, text)] = said([healthy(6), line, line | {"step": 8}])
    assert step == 7 and text.startswith("Step 7: the loss is exactly 0") and "--lr" in text
    assert said([line | {"loss": 1e-44}]) == []


@pytest.mark.parametrize(
    "accuracy, margin, words",
    [(0.0, -1.0, "wrong way"), (1.0, 3.0, "again and again"), (0.5, 0.0, "not move")],
)
def test_an_extreme_accuracy_is_named_after_a_whole_streak(accuracy, margin, words):
    lines = [healthy(i, implicit_accuracy=accuracy, margin=margin) for i in range(11, 100)]
    [(step, text)] = said([healthy(10), *lines])
    assert step == 10 + STREAK and text.startswith(f"Steps 11 to {step}: ") and words in text
    assert said(lines[: STREAK - 1]) == []
    broken = [*lines[: STREAK - 1], healthy(50), *lines[: STREAK - 1]]
    assert said(broken) == []  # the steps have to be in a row


def test_drift_is_named_when_both_errors_have_grown_and_not_one_alone():
    def lines(winner, loser):
        return [healthy(i, err_winner=0.1 * winner, err_loser=0.1 * loser) for i in range(1, 30)]

    [(step, text)] = said(lines(GROWTH * 1.01, GROWTH * 1.02))
    assert step == WINDOW and "winners (0.202)" in text and "losers (0.204)" in text
    assert said(lines(GROWTH * 1.01, GROWTH * 0.99)) == said(lines(0.5, GROWTH * 3)) == []
    outlier = [healthy(i) for i in range(1, 40)]
    outlier[20] |= {"err_winner": 0.9, "err_loser": 0.9}
    assert said(outlier) == []  # a mean over the window, not a step


# -------------------------------------------------------------------------------------------------
# Non-finite steps.


class Engine:
    """The part of DeepSpeed's engine that NonFiniteSteps sees."""

    def __init__(self, module=None):
        self.module, self.applied = module or torch.nn.Linear(2, 2), False
        self.optimizer = SimpleNamespace()

    def was_step_applied(self):
        return self.applied


def note(broken, loss_of_5=math.nan, err_ref=True):
    """Pairs 4 to 7 of rows 40 to 70, in two micro-steps."""
    for first in (4, 6):
        err = torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True)
        loss = torch.tensor([0.5, loss_of_5 if first == 4 else 0.6])
        captions = [f"caption {n}" for n in (first, first + 1)]
        t = torch.tensor([first, first + 1] * 2)
        numbers, rows = torch.tensor([first, first + 1]), [10 * first, 10 * first + 10]
        broken.note(numbers, rows, captions, t, err, err.detach() + 1 if err_ref else None, loss)


def stop(tmp_path, module=None, steps=(12, 13, 14), **values) -> tuple[str, dict]:
    """The sentence and the file of a run that is stopped at the last of these steps."""
    broken, engine = NonFiniteSteps(tmp_path, 1, len(steps)), Engine(module)
    for step in steps[:-1]:
        note(broken, **values)
        broken.after_step(step, engine)
    assert not (tmp_path / "nonfinite").exists()
    note(broken, **values)
    with pytest.raises(UserError) as caught:
        broken.after_step(steps[-1], engine)
    [file] = (tmp_path / "nonfinite").iterdir()
    assert file.name == f"step_{steps[-1]:06d}_rank_1.json"

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return str(caught.value), json.loads(file.read_text(), parse_constant=refuse)


def test_the_report_names_pairs_rows_timesteps_and_what_is_not_finite(tmp_path):
    sentence, report = stop(tmp_path)
    assert "3 steps in a row had a non-finite loss or gradient (steps 12 to 14)" in sentence
    assert str(tmp_path / "nonfinite") in sentence and "\n" not in sentence
    assert [pair["number"] for pair in report["pairs"]] == [4, 5, 6, 7]  # of the last step alone
    five = report["pairs"][1]
    assert (five["row"], five["caption"], five["t"]) == (50, "caption 5", 5)
    assert five["err_winner"] == pytest.approx(0.2) and five["err_loser"] == pytest.approx(0.4)
    assert five["err_ref_loser"] == pytest.approx(1.4) and five["loss"] == "nan"
    assert [pair["nonfinite"] for pair in report["pairs"]] == [[], ["loss"], [], []]
    assert report["statistics"]["loss"]["finite"] == 3 and report["statistics"]["err"]["all"] == 8
    assert report["statistics"]["err"]["max"] == pytest.approx(0.4)
    assert report["parameters"] == {"all": 2, "nonfinite": []}


def test_a_report_that_a_full_disk_refuses_is_part_of_the_one_sentence(tmp_path):
    (tmp_path / "nonfinite").write_text("")  # no file can be written there
    broken = NonFiniteSteps(tmp_path, 1, 1)
    note(broken)
    with pytest.raises(UserError, match=r"rank_1\.json could not be written \(.*; likely "):
        broken.after_step(12, Engine(None))


def test_sft_has_winners_alone_and_kto_a_loss_an_image(tmp_path):
    broken = NonFiniteSteps(tmp_path, 0, 1)
    x = torch.tensor([1.0, math.inf])
    broken.note([0, 1], [0, 1], ["", ""], torch.tensor([3, 4]), x, None, x)
    with pytest.raises(UserError):
        broken.after_step(1, Engine())
    broken.note([0], [0], [""], torch.tensor([3, 3]), x, x, x)
    with pytest.raises(UserError):
        broken.after_step(2, Engine())
    sft, kto = (json.loads(file.read_text()) for file in sorted((tmp_path / "nonfinite").iterdir()))
    assert sft["pairs"][1]["err"] == "inf" and "err_ref" not in sft["pairs"][1]
    assert (kto["pairs"][0]["loss_winner"], kto["pairs"][0]["loss_loser"]) == (1.0, "inf")


def test_what_is_likely_follows_from_where_it_broke(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert "backward" in stop(tmp_path / "a", net, loss_of_5=0.5)[0]
    assert "overflow" in stop(tmp_path / "b", net)[0]
    net[1].bias.data[0] = math.inf
    sentence, report = stop(tmp_path / "c", net)
    assert "weights" in sentence and report["parameters"]["nonfinite"] == ["1.bias"]


def test_only_steps_in_a_row_count_and_a_step_forgets_the_one_before(tmp_path):
    broken, engine = NonFiniteSteps(tmp_path, 0, 3), Engine()
    for step, engine.applied in enumerate([False, False, True] * 5, 1):
        note(broken)
        broken.after_step(step, engine)
        assert broken.notes == []
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------
# DeepSpeed.


def train(stage: int, precision: str, broken_micro=None, armed=True, **zero):
    """(weights, steps applied) of 4 steps of 2 micro-steps; step 1 has a NaN or is left out."""
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 8)
    half = {} if precision == "fp32" else {precision: {"enabled": True}}
    if precision == "fp16":
        half["fp16"]["loss_scale"] = 128
    engine, *_ = deepspeed.initialize(
        model=net,
        model_parameters=list(net.parameters()),
        config=half | {
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0} | zero,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
            "steps_per_print": 10**9,
        },
    )  # fmt: skip
    broken, applied = NonFiniteSteps(None, 0, 9), []
    if armed:
        guard.skip_nonfinite_steps(engine)
    for step in range(4):
        if step == 1 and broken_micro is None:
            continue
        for micro in range(2):
            x = torch.randn(2, 8, generator=torch.Generator().manual_seed(2 * step + micro))
            loss = engine(x.to(net.weight.dtype)).float().square().mean()
            engine.backward(loss * (math.nan if (step, micro) == (1, broken_micro) else 1.0))
            engine.step()
        applied.append(engine.was_step_applied())
        broken.after_step(step + 1, engine)
    full = safe_get_full_fp32_param(net.weight)
    return (net.weight if full is None else full).detach().clone(), applied


OFF = {"offload_optimizer": {"device": "cpu"}}
NORMLESS = {"compute_grad_norm": False}


@pytest.mark.parametrize(
    "stage, precision, zero",
    [
        *[(stage, half, OFF) for stage in (1, 2, 3) for half in ("bf16", "fp16")],
        *[(stage, half, {}) for stage in (1, 2, 3) for half in ("bf16", "fp32")],
        *[(stage, "fp32", NORMLESS) for stage in (1, 2)],
    ],
)
def test_training_continues_after_a_skipped_step_as_if_it_had_not_been(stage, precision, zero):
    expected, _ = train(stage, precision, **zero)
    weights, applied = train(stage, precision, 0, **zero)
    assert applied == [True, False, True, True] and weights.equal(expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_without_skip_nonfinite_steps_and_a_norm_deepspeed_applies_nan_in_fp32(stage):
    assert train(stage, "fp32", 0, armed=False, **NORMLESS)[0].isnan().any()


def test_the_limit_lets_the_loss_scale_fall_to_its_minimum_and_comes_before_deepspeeds_error():
    assert guard.limit({}) == guard.limit({"bf16": {"enabled": True}}) == 5
    assert guard.limit({"fp16": {"enabled": True, "loss_scale": 128}}) == 5
    fp16 = {"enabled": True, "initial_scale_power": 9, "hysteresis": 3, "min_loss_scale": 2}
    net = torch.nn.Linear(2, 2)
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=torch.optim.AdamW(net.parameters()),
        config={"fp16": fp16, "zero_optimization": {"stage": 2}, "train_batch_size": 1},
    )

    def skip():
        engine.backward(engine(torch.ones(1, 2).half()).sum() * math.nan)
        engine.step()

    for _ in range(guard.limit({"fp16": fp16})):
        assert engine.optimizer.loss_scale > 2
        skip()
    assert engine.optimizer.loss_scale == 2
    with pytest.raises(Exception, match="minimum"):
        skip()
