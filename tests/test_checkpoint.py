"""Laws of checkpoints: a kill, a full disk or a changed byte at any place, any ranks and stage.

As a script, `test_checkpoint.py FOLDER`, it is one of two ranks: see `two_ranks`."""

import contextlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from conftest import small_disk
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from launch import launch
from peft import LoraConfig, inject_adapter_in_model
from torch.optim.lr_scheduler import LambdaLR

import train_inpo
from system import checkpoint, processes
from system.files import UserError
from training.folder import read_metrics

SETTINGS = {"beta": 500.0, "seed": 0, "betas": (0.9, 0.999)}
deepspeed.utils.logger.setLevel("ERROR")

# -------------------------------------------------------------------------------------------------
# A model of 80 odd parameters and its training, by an engine and by hand.

PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2}},
}
LR, CLIP, SAVED, LAST = 1e-2, 0.5, 3, 7


def warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 5)


def net(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    parts = [torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3)]
    made = torch.nn.Sequential(parts[0], torch.nn.Tanh(), *parts[1:])
    if kind == "lora":
        config = LoraConfig(r=3, target_modules=["0", "3"], init_lora_weights="gaussian")
        made = inject_adapter_in_model(config, made.requires_grad_(False))
    return made


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step % 2)
    return torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator)


def by_hand(kind: str) -> list[float]:
    """The losses of a run that nothing disturbed."""
    model, losses = net(kind), []
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adamw = torch.optim.AdamW(weights, lr=LR)
    schedule = LambdaLR(adamw, warm_up)
    for step in range(LAST):
        x, y = batch(step)
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        adamw.step()
        schedule.step()
    return losses


def start(stage: int = 2, kind: str = "full", precision: str = "fp32", **more):
    """Sub-groups of 30 parameters: under ZeRO-3 a rank has several, and not the same on 1 and 2."""
    model = net(kind)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 30}
    zero |= {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000} | more
    config = {
        "train_batch_size": 4, "gradient_accumulation_steps": 1, "gradient_clipping": CLIP,
        "steps_per_print": 10**9, "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
        **PRECISIONS[precision],
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[weight for weight in model.parameters() if weight.requires_grad],
        config=config,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, warm_up),
    )
    return engine


def train(engine, begin: int, end: int) -> list[float]:
    losses, rank, world = [], dist.get_rank(), dist.get_world_size()
    dtype = next(engine.module.parameters()).dtype
    for step in range(begin, end):
        x, y = (part.chunk(world)[rank] for part in batch(step))
        loss = (engine(x.to(dtype)).float() - y).square().mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world)
    return losses


def state(engine) -> dict[str, torch.Tensor]:
    """Master weights, both moments, AdamW's step, the schedule and the loss scale."""
    found, inner = {}, engine.optimizer.optimizer
    if engine.zero_optimization_stage() < 3 and inner.state:  # else linked by the next step
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, weight in engine.module.named_parameters():
        if weight.requires_grad:
            full = safe_get_full_fp32_param(weight)
            found[name] = (weight if full is None else full).detach().float().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                if inner.state:
                    found[f"{name} {key}"] = safe_get_full_optimizer_state(weight, key).clone()
    steps = {float(one["step"]) for one in inner.state.values() if "step" in one}
    numbers = [*steps, engine.get_lr()[0], engine.lr_scheduler.last_epoch, engine.global_steps]
    if engine.fp16_enabled():
        scaler = engine.optimizer.loss_scaler
        numbers += [scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter]
    return found | {"numbers": torch.tensor(numbers, dtype=torch.float64)}


def masters(saved: dict) -> dict:
    return {name: w for name, w in saved.items() if " " not in name and name != "numbers"}


def trained(steps: int, stage: int = 2) -> tuple:
    """(an engine after that many steps, its state)."""
    engine = start(stage)
    train(engine, 0, steps)
    return engine, state(engine)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save(engine, folder: Path, step: int, keep: int = 2, every: int = 0):
    return checkpoint.save(engine, step, folder, SETTINGS, keep, every)


def resume(engine, folder: Path) -> int:
    return checkpoint.resume(engine, folder, SETTINGS)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -------------------------------------------------------------------------------------------------
# Every pair of ranks, stages and precisions.


# (stage, kind, precision) of a run.
CASES = [(stage, kind, "fp32") for stage in (1, 2, 3) for kind in ("full", "lora")]
CASES += [(stage, "full", "bf16") for stage in (1, 2, 3)] + [(s, "full", "fp16") for s in (2, 3)]


def name_of(world: int, stage: int, kind: str, precision: str) -> str:
    return f"{kind}-{precision}-{stage}-{world}"


def write(folder: Path):
    """SAVED steps of each kind of run, their checkpoint and what it must restore; then the rest."""
    world = dist.get_world_size()
    for case in CASES:
        place = folder / name_of(world, *case)
        engine = start(*case)
        before = train(engine, 0, SAVED)
        assert save(engine, place, SAVED) is None
        saved = state(engine)
        losses = before + train(engine, SAVED, LAST)
        if dist.get_rank() == 0:
            torch.save((saved, losses), folder / f"{place.name}.pt")


def read(folder: Path) -> dict[str, tuple]:
    """On this number of ranks: each checkpoint by each stage; "from to": (restored?, losses)."""
    found, world = {}, dist.get_world_size()
    for before, source, now in itertools.product((1, 2), CASES, CASES):
        if source[1:] != now[1:]:
            continue
        place = folder / name_of(before, *source)
        saved, _ = torch.load(folder / f"{place.name}.pt")
        engine = start(*now)
        assert resume(engine, place) == SAVED
        assert names(place) == [f"step_{SAVED:06d}"]
        restored = same(state(engine), saved)
        losses = train(engine, SAVED, LAST)
        found[f"{place.name} {name_of(world, *now)}"] = (restored, losses)
    return found


def begins() -> dict[str, list[float]]:
    """On this number of ranks, of each kind of half-precision engine: the largest error of its
    master weights before and after set_master_weights, and of its own weights as those rounded."""
    found, offload = {}, {"offload_optimizer": {"device": "cpu"}}
    cases = itertools.product((1, 2, 3), ("full", "lora"), ("bf16", "fp16"), ({}, offload))
    for *case, more in cases:
        engine, true = start(*case, **more), net(case[1]).state_dict()

        def error(engine=engine, true=true) -> float:
            return max((w - true[k]).abs().max().item() for k, w in masters(state(engine)).items())

        errors = [error()]
        checkpoint.set_master_weights(engine, true)
        errors.append(error())
        for name, weight in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
                errors.append((weight - true[name].to(weight.dtype)).abs().max().item())
        name = f"{name_of(dist.get_world_size(), *case)} {' '.join(more)}"
        found[name] = [*errors[:2], max(errors[2:])]
    return found


def two_ranks(folder: Path):
    write(folder)
    found, starts = read(folder), begins()
    failures = [
        fail(folder / f"disk-{stage}-{rank}", stage, rank) for stage in (1, 2, 3) for rank in (0, 1)
    ]
    if dist.get_rank() == 0:
        torch.save((found, failures, starts), folder / "two.pt")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """(folder, results of all pairs, what full disks did, how engines started)."""
    folder = tmp_path_factory.mktemp("matrix")
    write(folder)
    launch([str(folder)], 2, "tests/test_checkpoint.py")
    found, failures, starts = torch.load(folder / "two.pt", weights_only=False)
    return folder, found | read(folder), failures, starts | begins()


@pytest.mark.slow
def test_on_any_ranks_and_stage_a_run_resumes_as_if_undisturbed(matrix):
    folder, found, *_ = matrix
    assert len(found) == 2 * 2 * (2 * 9 + 9 + 4)
    assert not [pair for pair, (restored, _) in found.items() if not restored]
    for kind in ("full", "lora"):
        expected = by_hand(kind)
        assert abs(expected[-1] - expected[SAVED]) > 0.01  # the test would see steps left out
        for pair, (_, losses) in found.items():
            if pair.startswith(f"{kind}-fp32"):
                assert losses == pytest.approx(expected[SAVED:], rel=1e-4), pair
            elif pair.startswith(kind):
                _, undisturbed = torch.load(folder / f"{pair.split()[0]}.pt")
                assert losses == pytest.approx(undisturbed[SAVED:], rel=0.02), pair


@pytest.mark.slow
def test_weights_are_the_engines_fp32_master_weights(matrix):
    folder, *_ = matrix
    for place in (folder / name_of(world, *case) for world in (1, 2) for case in CASES):
        saved, _ = torch.load(folder / f"{place.name}.pt")
        assert same(checkpoint.weights(place / f"step_{SAVED:06d}"), masters(saved)), place.name


@pytest.mark.slow
def test_in_half_precision_the_master_weights_start_with_all_their_digits(matrix):
    *_, starts = matrix
    assert len(starts) == 2 * 3 * 2 * 2 * 2  # ranks, stages, kinds, precisions, offload
    for name, (before, after, rounded) in starts.items():
        assert before > 1e-5 and after == rounded == 0, name  # DeepSpeed's own are rounded


# -------------------------------------------------------------------------------------------------
# Full disks.


def fail(folder: Path, stage: int, rank: int) -> list:
    """Save while this rank's disk is full, and again when there is room: all that was seen."""
    engine = start(stage)
    train(engine, 0, 1)
    seen = [save(engine, folder, 1)]
    train(engine, 1, 2)
    with small_disk(1000) if dist.get_rank() == rank else contextlib.nullcontext():
        said = save(engine, folder, 2)
    seen += [processes.gather(said), names(folder)]
    seen += [save(engine, folder, 2), names(folder)]
    saved, engine = state(engine), start(stage)
    return [*seen, resume(engine, folder), same(state(engine), saved)]


@pytest.mark.slow
def test_a_full_disk_on_one_rank_is_one_sentence_on_all_and_costs_no_older_checkpoint(matrix):
    _, _, failures, _ = matrix
    assert len(failures) == 6
    for seen in failures:
        first, (said, other), between, again, after, step, restored = seen
        assert first is None and again is None
        assert "File too large" in said and said == other and "\n" not in said
        assert between == ["step_000001"] and after == ["step_000001", "step_000002"]
        assert step == 2 and restored


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path, monkeypatch):
    engine, _ = trained(2)
    save(engine, tmp_path, 1)

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "makedirs", refuse)  # root may write to any folder
    assert "Permission denied" in save(engine, tmp_path, 2)
    assert names(tmp_path) == ["step_000001"]
    monkeypatch.undo()
    assert save(engine, tmp_path, 2) is None


# -------------------------------------------------------------------------------------------------
# Kills.


class Kill(BaseException):
    pass


def kill_at(k: int, patch):
    """The k-th call (from 0) that changes the disk is done by half, at most, and raises Kill."""
    calls = itertools.count()

    def half_write(_, file):
        with open(file, "wb") if isinstance(file, str | Path) else file as opened:
            opened.write(b"PK half")

    def nothing(*_):
        pass

    def half_remove(path, **_):
        if files := [file for file in Path(path).rglob("*") if file.is_file()]:
            files[0].unlink()

    def wrap(true, half):
        def call(*args, **options):
            if next(calls) < k:
                return true(*args, **options)
            half(*args, **options)
            raise Kill

        return call

    kinds = [(torch, "save", half_write), (shutil, "rmtree", half_remove)]
    moves = [(Path, "rename", nothing), (Path, "replace", nothing)]
    for owner, name, half in [*kinds, (os, "fsync", nothing), *moves]:
        patch.setattr(owner, name, wrap(getattr(owner, name), half))


def test_a_kill_at_any_instant_of_saving_leaves_a_whole_checkpoint(tmp_path):
    """Step 3 is written beside 1 and 2, and 1 is deleted; then the run is started again."""
    engine, wanted = start(), {}
    for step in (1, 2, 3):
        train(engine, step - 1, step)
        wanted[step] = state(engine)
        if step < 3:
            save(engine, tmp_path / "first", step)
    seen = []
    for k in itertools.count():
        folder = tmp_path / str(k)
        shutil.copytree(tmp_path / "first", folder)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(k, patch)
            try:
                save(engine, folder, 3)
                break
            except Kill:
                pass
        whole = [path for path in folder.iterdir() if path.suffix == ""]
        for path in whole:
            assert same(checkpoint.weights(path), masters(wanted[checkpoint.step_of(path)]))
        fresh = start()
        step = resume(fresh, folder)
        assert same(state(fresh), wanted[step])
        assert set(names(folder)) == {path.name for path in whole}  # no leftovers
        seen.append((step, len(whole)))
        train(fresh, step, 4)
        assert save(fresh, folder, 4) is None and len(names(folder)) == 2
    assert len(seen) >= 9 and seen[0] == (2, 2) and seen[-1] == (3, 2) and (3, 3) in seen


def test_a_kill_at_any_instant_of_a_conversion_leaves_the_checkpoint(tmp_path):
    engine, wanted = trained(2)
    save(engine, tmp_path, 2)
    kills = 0
    for k in itertools.count(0, 7):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(k, patch)
            try:
                resume(start(3), tmp_path)
                break
            except Kill:
                kills += 1
        engine = start(3)
        assert resume(engine, tmp_path) == 2 and same(state(engine), wanted)
        assert names(tmp_path) == ["step_000002"]
    assert kills >= 5


def test_step_0_is_never_saved_so_that_any_stage_and_ranks_continue_from_it(tmp_path):
    engine, before = trained(0)
    assert save(engine, tmp_path, 0) is None and names(tmp_path) == []
    (tmp_path / "step_000001.partial").mkdir()  # a kill left it
    engine = start(3)
    assert resume(engine, tmp_path) == 0 and names(tmp_path) == []
    assert same(masters(state(engine)), masters(before))


def test_a_full_disk_during_a_conversion_is_one_sentence(tmp_path):
    engine, _ = trained(1)
    save(engine, tmp_path, 1)
    with small_disk(1000), pytest.raises(UserError, match="step_000001: cannot be converted"):
        resume(start(3), tmp_path)
    assert names(tmp_path) == ["step_000001"]


# -------------------------------------------------------------------------------------------------
# Broken files.


def shard(path: Path, kind: str = "optim") -> Path:
    return next(path.glob(f"*{kind}_states.pt"))


def listed(path: Path) -> Path:
    return path / checkpoint.LIST


def flip(file: Path, place: int):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def garble(path: Path, **changes):
    facts = json.loads(listed(path).read_text()) | (changes or {"files": {"a.pt": 1}})
    listed(path).write_text(json.dumps(facts))


BREAK = {
    "optim_states.pt has 5,000 of": lambda path: os.truncate(shard(path), 5000),
    "optim_states.pt has changed": lambda path: flip(shard(path), 2000),
    "optim_states.pt cannot be read (No such": lambda path: shard(path).unlink(),
    "model_states.pt cannot be read (No such": lambda path: shard(path, "model").unlink(),
    "checkpoint.json cannot be read (Expecting": lambda path: listed(path).write_text(""),
    "checkpoint.json cannot be read (it lacks step, world": lambda path: listed(path).write_text(
        "{}"
    ),
    "checkpoint.json has changed": garble,
    "checkpoint.json cannot be read (it holds no": lambda path: listed(path).write_text("[]"),
    "checkpoint.json cannot be read (it is not": lambda path: listed(path).write_bytes(b"\xff"),
    "checkpoint.json cannot be read (it lacks run)": lambda path: garble(path, run=None),
    "checkpoint.json cannot be read (No such": lambda path: listed(path).unlink(),
}


def test_a_broken_checkpoint_is_set_aside_and_the_one_before_it_used(tmp_path, capsys):
    engine, wanted = trained(1)
    save(engine, tmp_path / "whole", 1)
    train(engine, 1, 2)
    save(engine, tmp_path / "whole", 2)
    engine = start()
    for number, (words, damage) in enumerate(BREAK.items()):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / "step_000002")
        left = {path.name: path.read_bytes() for path in (folder / "step_000002").iterdir()}
        with pytest.raises(UserError) as error:
            checkpoint.weights(folder / "step_000002")
        assert words in str(error.value)
        capsys.readouterr()
        assert resume(engine, folder) == 1 and same(state(engine), wanted)
        said = capsys.readouterr().out.strip().splitlines()
        assert len(said) == 1 and said[0].startswith("Warning: ") and words in said[0]
        assert names(folder) == ["step_000001", "step_000002.broken"]
        kept = folder / "step_000002.broken"
        assert {path.name: path.read_bytes() for path in kept.iterdir()} == left

        # None can be read: refused each time, and all is left as it is.
        damage(folder / "step_000001")
        for _ in range(2):
            with pytest.raises(UserError, match="none of its checkpoints") as error:
                resume(engine, folder)
            assert words in str(error.value) and "\n" not in str(error.value)
            assert names(folder) == ["step_000001", "step_000002.broken"]


def test_a_step_that_breaks_twice_is_set_aside_twice(tmp_path):
    engine, _ = trained(1)
    for step in (1, 2):
        save(engine, tmp_path, step)
    for _ in range(2):
        shard(tmp_path / "step_000002").unlink()
        assert resume(start(), tmp_path) == 1
        save(engine, tmp_path, 2)
    assert len(names(tmp_path)) == 4 and len(list(tmp_path.glob("*.broken*"))) == 2


def test_every_flipped_bit_is_seen(tmp_path):
    engine, _ = trained(1)
    save(engine, tmp_path, 1)
    path = tmp_path / "step_000001"
    for file in path.glob("*.pt"):
        for place in range(0, file.stat().st_size, 101):
            flip(file, place)
            assert f"{file} has changed" in checkpoint._flaw(path)
            flip(file, place)
    assert checkpoint._flaw(path) is None


# -------------------------------------------------------------------------------------------------
# Which checkpoints there are.


def test_the_newest_and_every_nth_are_kept_and_a_broken_one_always(tmp_path):
    engine, _ = trained(1)
    for name in ("step_000001.broken", "step_000000.universal", "step_000000.old", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for step in range(1, 9):
        assert save(engine, tmp_path, step, keep=2, every=3) is None
        numbers = [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path)]
        assert numbers == [n for n in range(step, 0, -1) if n > step - 2 or n % 3 == 0]
    kept = [f"step_{step:06d}" for step in (3, 6, 7, 8)]
    assert names(tmp_path) == ["other", "step_000001.broken", *kept]


def test_an_old_checkpoint_that_cannot_be_deleted_is_tried_again(tmp_path, monkeypatch):
    def refuse(path, target):
        raise PermissionError(13, "Permission denied", str(path))

    (engine, _), rename = trained(1), Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda a, b: refuse(a, b) if b.suffix == ".old" else rename(a, b)
    )
    for step in (1, 2, 3):
        assert save(engine, tmp_path, step) is None
    assert len(names(tmp_path)) == 3
    monkeypatch.undo()
    assert save(engine, tmp_path, 4) is None and names(tmp_path) == ["step_000003", "step_000004"]


def test_an_existing_checkpoint_is_not_rewritten(tmp_path):
    engine, _ = trained(1)
    save(engine, tmp_path, 1)
    before = shard(tmp_path / "step_000001").stat()
    assert save(engine, tmp_path, 1) is None
    assert shard(tmp_path / "step_000001").stat() == before


def test_a_checkpoint_of_another_run_is_refused_with_the_keys_that_differ(tmp_path):
    engine, before = trained(1)
    save(engine, tmp_path, 1)
    for other, words in (
        (SETTINGS | {"beta": 501.0}, "beta: 500.0 there, 501.0 now"),
        (SETTINGS | {"lr": 1.0}, "lr: None there, 1.0 now"),
    ):
        with pytest.raises(UserError) as error:
            checkpoint.resume(engine, tmp_path, other)
        assert words in str(error.value) and "seed" not in str(error.value)
    assert names(tmp_path) == ["step_000001"] and same(state(engine), before)


# -------------------------------------------------------------------------------------------------
# The job.


def test_the_job_resumes_with_another_stage_or_micro_batch_but_not_another_beta(
    argv, ds_config, tmp_path, capsys
):
    def go(out: str, **flags) -> list[float]:
        # One cell of timesteps: a cell belongs to a micro-step.
        given = {"out": tmp_path / out, "checkpoint_every": 2, "inversion_steps": 1} | flags
        train_inpo.main(argv(**given))
        return [line["loss"] for line in read_metrics(tmp_path / out)]

    expected = go("whole", steps=4)
    go("half", steps=2)
    fused = json.loads(ds_config(3).read_text())["optimizer"]
    fused["params"] |= {"fused": True}  # that may change, like torch_adam
    for name, flags in (
        ("stage", {"ds_config": ds_config(3, optimizer=fused)}),
        ("micro", {"micro_batch": 1}),
    ):
        shutil.copytree(tmp_path / "half", tmp_path / name)
        capsys.readouterr()
        assert go(name, steps=4, **flags) == pytest.approx(expected, rel=1e-3)
        said = capsys.readouterr().out
        assert "at step 2 of 4" in said
        assert ("written by 1 rank(s) with ZeRO-2; converting" in said) == (name == "stage")
        assert not list((tmp_path / name / "checkpoints").glob("*universal*"))
    assert abs(expected[3] - expected[1]) > 1e-4

    # The checkpoints know their run even where run.json does not.
    shutil.copytree(tmp_path / "half", tmp_path / "beta")
    record = tmp_path / "beta" / "run.json"
    for words in ("--out", "step_000002: is a checkpoint of another run"):
        with pytest.raises(SystemExit) as stop:
            go("beta", steps=4, beta=501)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and "Traceback" not in said
        assert words in said and "beta: 500.0 there, 501.0 now" in said
        record.write_text(record.read_text().replace('"beta": 500.0', '"beta": 501.0'))


if __name__ == "__main__":
    processes.join()
    two_ranks(Path(sys.argv[1]))
