"""What goes wrong in preference training, noticed early. Needs torch alone.

`Watch` reads the metrics; `NonFiniteSteps` stops a run whose steps stay non-finite and writes down
where.

    skip_nonfinite_steps(engine)                                 # after deepspeed.initialize
    watch, nonfinite = Watch(), NonFiniteSteps(out, rank, limit(ds_config))
    nonfinite.note(n, rows, captions, t, err, err_ref, losses)   # each micro-step, without a sync
    nonfinite.after_step(step, engine)                           # each step; may raise UserError
    for sentence in watch(line): ...                             # each line of metrics.jsonl
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from system.files import UserError, write

# -------------------------------------------------------------------------------------------------
# The metrics.

# Steps in a row with one and the same extreme accuracy. With the smallest batch of a recipe, 4
# pairs, that is 80 agreements: 2^-80 by chance, 1 in 4600 for a model that is right in 9 of 10.
STREAK = 20
# The tiny model's errors reach 1.80 times the reference's under its good recipe, and 1.86 with eta
# 0; 2.1 and more came with settings that drift twice as far or more, or lose faithfulness: beta 100
# and 300, random noise, inversion by the reference, DPO at lr 1e-5 and 2e-5 (docs/).
GROWTH, WINDOW = 2.0, 10  # mean over the last WINDOW steps, errors scatter with t


class Watch:
    """Warnings about the lines of metrics.jsonl; each kind at most once a run.

    Values that a method does not have (SFT has no reference) are not judged."""

    def __init__(self):
        self.said, self.recent = set(), []

    def __call__(self, line: dict) -> list[str]:
        """line: the step and the means over its pairs, see loss.py. Returns what is new to say."""
        self.recent = [*self.recent, line][-max(STREAK, WINDOW) :]
        new = [(kind, text) for kind, text in self._judge(line) if kind not in self.said]
        self.said |= {kind for kind, _ in new}
        return [text for _, text in new]

    def _judge(self, line: dict):
        step = line["step"]
        if "margin" not in line or "err_ref_winner" not in line:  # SFT; MaPO has no reference
            return
        if line["loss"] == 0:
            yield (
                "saturated",
                f"Step {step}: the loss is exactly 0 (mean margin {line['margin']:.4g}): no pair "
                "has a gradient, all are past the range of the sigmoid in fp32. Likely --lr or "
                "--beta is too large (take a tenth), or the files of --model or --unet, which are "
                "the reference, changed since the run started.",
            )
        streak = self.recent[-STREAK:]
        seen = {one["implicit_accuracy"] for one in streak} if len(streak) == STREAK else set()
        since = f"Steps {streak[0]['step']} to {step}: "
        if seen == {0.0}:
            yield (
                "backwards",
                f"{since}the implicit accuracy is exactly 0, no winner gains on its loser: the "
                "updates go the wrong way. Likely --lr is so large that training diverges, or "
                "code that was changed exchanges winners and losers, or policy and reference "
                "(labels that are swapped in the data do not show here: look at the samples).",
            )
        if seen == {1.0}:
            yield (
                "memorised",
                f"{since}the implicit accuracy is exactly 1: over-optimisation, or a handful of "
                "pairs seen again and again. Take fewer --steps, a smaller --lr or more data.",
            )
        if seen == {0.5} and all(one["margin"] == 0 for one in streak):
            yield (
                "still",
                f"{since}the implicit accuracy is exactly 0.5 and the margin 0: the policy does "
                "not move. Likely its weights are frozen, or --lr is below what its precision "
                "can add to a weight.",
            )
        last = self.recent[-WINDOW:]
        mean = {
            key: sum(one[key] for one in last) / WINDOW
            for key in ("err_winner", "err_loser", "err_ref_winner", "err_ref_loser")
        }
        winner = mean["err_winner"], mean["err_ref_winner"]
        loser = mean["err_loser"], mean["err_ref_loser"]
        if len(last) == WINDOW and all(err > GROWTH * ref for err, ref in (winner, loser)):
            yield (
                "drift",
                f"Steps {last[0]['step']} to {step}: the errors of winners ({winner[0]:.4g}) and "
                f"losers ({loser[0]:.4g}) are both above {GROWTH:g} times the reference's "
                f"({winner[1]:.4g}, {loser[1]:.4g}): the model drifts away from both images, "
                "which is over-optimisation. Take a smaller --lr or a larger --beta.",
            )


# -------------------------------------------------------------------------------------------------
# Non-finite steps.


def limit(ds_config: dict) -> int:
    """How many skipped steps in a row stop a run.

    5, but dynamic loss scaling in fp16 skips steps until the scale fits: the first `hysteresis` - 1
    leave it, each further one halves it, from 2^initial_scale_power to min_loss_scale, after which
    DeepSpeed raises an error of its own. By default these are 2 - 1 + 16 = 17."""
    fp16 = ds_config.get("fp16", {})
    if not fp16.get("enabled") or fp16.get("loss_scale", 0):
        return 5
    halvings = fp16.get("initial_scale_power", 16) - math.log2(fp16.get("min_loss_scale", 1))
    return max(5, fp16.get("hysteresis", 2) - 1 + math.ceil(halvings))


class NonFiniteSteps:
    """Counts the steps in a row that DeepSpeed skipped because a gradient was not finite.

    out: the run's folder. limit: of such steps, see `limit`. All ranks skip the same steps, so all
    stop at the same one, and each writes what it saw."""

    def __init__(self, out: Path, rank: int, limit: int):
        self.out, self.rank, self.limit = out, rank, limit
        self.skipped, self.notes = 0, []

    def note(self, numbers, rows, captions, t: Tensor, err: Tensor, err_ref, losses: Tensor):
        """Remember a micro-step of P pairs until the step's end; tensors stay where they are.

        numbers, rows: (P,). captions: P. t, err, err_ref: (2P,), winners first, or (P,) of winners
        alone; err_ref may be None. losses: (P,) a pair or (2P,) an image."""
        values = {"t": t, "err": err, "err_ref": err_ref, "loss": losses}
        values = {name: value.detach() for name, value in values.items() if value is not None}
        self.notes.append((numbers, rows, captions, values))

    def after_step(self, step: int, engine):
        """Call after every optimizer step (from 1); repairs DeepSpeed, see `reset_after_skip`.

        After `limit` skipped steps in a row it writes out/nonfinite/step_XXXXXX_rank_R.json and
        raises UserError."""
        notes, self.notes = self.notes, []
        if engine.was_step_applied():
            self.skipped = 0
            return
        reset_after_skip(engine)
        self.skipped += 1
        if self.skipped < self.limit:
            return
        pairs = [pair for note in notes for pair in _pairs(*note)]
        parameters = _parameters(engine.module)
        file = self.out / "nonfinite" / f"step_{step:06d}_rank_{self.rank}.json"
        report = {"step": step, "rank": self.rank, "skipped_in_a_row": self.skipped}
        report |= {"parameters": parameters, "statistics": _statistics(notes), "pairs": pairs}
        where = f"{file.parent} has the last one's rows and timesteps"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, json.dumps(_plain(report), indent=1, allow_nan=False) + "\n")
        except OSError as error:
            where = f"{file} could not be written ({error.strerror})"
        if parameters["nonfinite"]:
            likely = "the weights themselves are broken: start from an earlier checkpoint"
        elif any(pair["nonfinite"] for pair in pairs):
            likely = "images, VAE or UNet overflow: see its pairs, and prefer bf16 to fp16"
        else:
            likely = (
                "this rank's losses are finite and a backward pass overflows: take a smaller --lr "
                "or --beta, or bf16 in place of fp16"
            )
        raise UserError(
            f"{self.skipped} steps in a row had a non-finite loss or gradient (steps "
            f"{step - self.skipped + 1} to {step}); {where}; likely {likely}."
        )


def _pairs(numbers, rows, captions, values: dict[str, Tensor]) -> list[dict]:
    """One record per pair; a value of 2P entries is split into winner and loser."""
    columns = {"number": [int(n) for n in numbers], "row": [int(row) for row in rows]}
    columns["caption"] = list(captions)
    columns["t"] = values["t"].tolist()[: len(captions)]
    measured = {}
    for name in ("err", "err_ref", "loss"):
        if name in values:
            parts = values[name].double().cpu().split(len(captions))
            ends = ("_winner", "_loser") if len(parts) == 2 else ("",)
            measured |= {name + end: part.tolist() for end, part in zip(ends, parts, strict=True)}
    columns |= measured
    records = [
        dict(zip(columns, record, strict=True)) for record in zip(*columns.values(), strict=True)
    ]
    for record in records:
        record["nonfinite"] = [name for name in measured if not math.isfinite(record[name])]
    return records


def _statistics(notes: list) -> dict:
    """How many values of the step's images on this rank are finite, and their range."""
    result = {}
    for name in ("err", "err_ref", "loss"):
        parts = [values[name].double().cpu() for *_, values in notes if name in values]
        if parts:
            value = torch.cat(parts)
            finite = value[value.isfinite()]
            result[name] = {"all": len(value), "finite": len(finite)}
            if len(finite):
                low, mean, high = finite.min().item(), finite.mean().item(), finite.max().item()
                result[name] |= {"min": low, "mean": mean, "max": high}
    return result


def _parameters(module: torch.nn.Module) -> dict:
    """The names of the non-finite ones; under ZeRO-3 those of this rank's shard."""
    tensors = {name: getattr(p, "ds_tensor", p).data for name, p in module.named_parameters()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    return {"all": len(tensors), "nonfinite": broken}


def _plain(node):
    """With nan and inf as strings, since JSON has neither."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node


# -------------------------------------------------------------------------------------------------
# DeepSpeed 0.19.8.


def skip_nonfinite_steps(engine):
    """Let ZeRO-1 and -2 skip non-finite steps under every configuration.

    In fp32 they check only the norm of the gradients (engine.py, _configure_zero_optimizer), and
    with zero_optimization.compute_grad_norm false not even that: NaN would be applied."""
    if hasattr(engine.optimizer, "check_grad_overflow"):
        engine.optimizer.check_grad_overflow = True


def reset_after_skip(engine):
    """Drop the gradients of a step that was skipped.

    ZeRO-1 and -2 with the optimizer on the CPU keep them: step() in stage_1_and_2.py returns early,
    after reset_cpu_buffers(), which does not clear averaged_gradients, and the fp32 accumulation
    adds to them. After one NaN every later step would be skipped, too. Without offload step() sets
    them to None itself."""
    if getattr(engine.optimizer, "cpu_offload", False):  # only ZeRO-1 and -2 have the attribute
        for group in engine.optimizer.averaged_gradients:
            engine.optimizer.averaged_gradients[group] = None
