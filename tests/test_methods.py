"""Laws of the methods: steps, randomness, recipes, cost and exports, on random checkpoints."""

import copy
import itertools
import json
import re
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from types import SimpleNamespace

import deepspeed
import diffusers
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from by_hand import ByHand
from conftest import distance, metrics, refuse, weights
from launch import launch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import model
import train_inpo
from loss import dpo_loss, kto_loss
from training import budget, methods, plan, preview, run
from training.flags import parse
from training.latents import draw_timesteps
from training.recipes import METHODS, TITLES, recipe_of
from weights import saving

TABLE = ("inpo", "dpo", "kto", "sft")  # of the paper
NOISE = ("dpo", "kto", "sft")  # methods of forward noise


def flags_of(method: str) -> dict:
    return {"method": method} | ({"beta": None} if method == "sft" else {})


def cost_of(out: Path) -> dict:
    return json.loads((out / "cost.json").read_text())


def exported(out: Path, step: int) -> dict[str, torch.Tensor]:
    folder = out / "unets" / f"step_{step:06d}"
    return diffusers.UNet2DConditionModel.from_pretrained(folder).state_dict()


# -------------------------------------------------------------------------------------------------
# The steps, against those written by hand.


@pytest.mark.parametrize(
    "flags, ranks",
    [
        ({"method": "inpo", "eta": 0}, 1),
        ({"method": "inpo", "eta": 0, "inverter": "reference"}, 1),
        ({"method": "inpo", "eta": 0, "inversion_spacing": "log-sigma", "inversion_steps": 4}, 2),
        ({"method": "dpo"}, 1),
        ({"method": "kto", "strata": 10}, 2),
        ({"method": "sft", "beta": None}, 1),
        ({"method": "kto", "latents": "inversion", "eta": 0}, 1),
        ({"method": "inpo", "objective": "sft", "beta": None, "eta": 0}, 1),
        ({"method": "smpo"}, 1),
        ({"method": "dspo", "beta": 0.5, "safe_loser": 0.9}, 1),
        pytest.param({"method": "dmpo", "safe_loser": 0.9}, 2, marks=pytest.mark.slow),
        pytest.param({"method": "mapo", "beta": 0.5}, 1, marks=pytest.mark.slow),
        pytest.param({"method": "smpo", "latents": "noise"}, 2, marks=pytest.mark.slow),
    ],
    ids=["inpo", "inpo-by-reference", "inpo-log-sigma-2-ranks", "dpo", "kto-2-ranks", "sft"]
    + ["kto-on-inversion", "sft-on-inversion", "smpo-by-renoise", "dspo-safe"]
    + ["dmpo-safe-2-ranks", "mapo", "smpo-on-noise-2-ranks"],
)
def test_steps_of_each_method_equal_those_written_by_hand(
    flags, ranks, argv, tmp_path, ds_config, checkpoint, pairs
):
    """Without clipping: clipped gradients do not show a wrong scale."""
    if flags["method"] == "smpo":
        table, sure = pq.read_table(pairs), [0.5 + 0.5 * (i % 7) / 6 for i in range(24)]
        pq.write_table(table.append_column("strength", pa.array(sure)), tmp_path / "sure.parquet")
        flags = flags | {"data": tmp_path / "sure.parquet"}
    out, config = tmp_path / "run", ds_config(clipping=0.0)
    command = argv(**flags, ds_config=config, micro_batch=2 // ranks, export_every=1)
    if ranks == 1:
        train_inpo.main(command)
    else:
        launch(command, ranks)
    hand, start = ByHand(command, ranks), weights(checkpoint())
    for step, expected in enumerate(hand.weights, start=1):
        moved = distance(expected, start)
        assert moved > 1e-4  # the test would see a step that was left out
        assert distance(exported(out, step), expected) < 1e-3 * moved
    assert distance(exported(out, 2), weights(out)) == 0
    lines = metrics(out)
    assert [line["loss"] for line in lines] == pytest.approx(hand.losses, rel=1e-4)
    assert abs(hand.losses[1] - hand.losses[0]) > 1e-4
    assert cost_of(out)["unet_calls"] == hand.calls and cost_of(out)["devices"] == ranks
    if flags == {"method": "kto", "strata": 10}:
        kls = [sum(hand.kls[:2]) / 2, sum(hand.kls[2:]) / 2]
        assert [line["kl"] for line in lines] == pytest.approx(kls, rel=1e-3)
        assert hand.kls[0] == hand.kls[1] == 0 and min(hand.kls[2:]) > 0.01
        alone = ByHand(command, ranks, kl_ranks=1)  # each rank's own reference point would be seen
        assert abs(alone.losses[1] - hand.losses[1]) > 0.01
        assert distance(alone.weights[1], hand.weights[1]) > 0.1 * moved


# -------------------------------------------------------------------------------------------------
# Latents and objectives are independent.


def test_an_objective_of_ones_own_is_one_row(runs, argv, tmp_path, monkeypatch, capsys):
    """A hinge on the margin, of beta: here, in --help, plan, card, curves and cost."""

    def hinge(args, errors):
        better = errors.err_ref - errors.err
        margin = args.beta / 2 * (better.chunk(2)[0] - better.chunk(2)[1])
        return (1 - margin).clamp(min=0), dpo_loss(errors.err, errors.err_ref, args.beta)[1]

    row = methods.Objective("a hinge, beta {beta:g}", hinge, ("beta",), "inpo", "hinge", (1.0, "1"))
    monkeypatch.setitem(methods.OBJECTIVES, "hinge", row)
    command = argv(method="kto", objective="hinge", latents="inversion", lr=1e-3)
    train_inpo.main(command)
    said = capsys.readouterr().out
    assert "Diffusion-KTO: a hinge, beta 500, on latents by inversion by the policy" in said
    lines, record = metrics(tmp_path / "run"), json.loads((tmp_path / "run/run.json").read_text())
    assert lines[0]["loss"] == pytest.approx(1, abs=1e-5) and lines[1]["loss"] != lines[0]["loss"]
    assert {k: record[k] for k in ("latents", "objective", "liked_share", "eta")} == {
        "latents": "inversion", "objective": "hinge", "liked_share": None, "eta": 0.1,
    }  # fmt: skip
    card = (tmp_path / "run/README.md").read_text()
    assert "fine-tuned by a hinge, beta 500, on latents by inversion" in card
    assert "-kto-inversion-hinge" in card
    assert cost_of(tmp_path / "run")["unet_calls"] == cost_of(runs["inpo"].out)["unet_calls"]
    with pytest.raises(SystemExit):
        train_inpo.main(["--help"])
    assert "hinge" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["sdxl", "sd15", "tiny"])
@pytest.mark.parametrize("method", METHODS)
def test_a_cross_takes_the_flags_of_its_parts_from_the_methods_they_are_of(method, preset):
    for latents in methods.LATENTS:
        for objective in methods.OBJECTIVES:
            found = recipe_of(preset, method, "published", latents, objective)
            meant = {*methods.LATENTS[latents].flags, *methods.OBJECTIVES[objective].flags}
            known = {flag for row in methods.LATENTS.values() for flag in row.flags}
            known |= {flag for row in methods.OBJECTIVES.values() for flag in row.flags}
            assert {flag for flag in known if found[flag] is not None} == meant
            own = recipe_of(preset, method)
            assert all(found[flag] == own[flag] for flag in own.keys() - known - {
                "latents", "objective",
            })  # fmt: skip
            if (latents, objective) == (own["latents"], own["objective"]):
                assert found == own


# -------------------------------------------------------------------------------------------------
# KTO's weights.


@pytest.fixture
def two_ranks(monkeypatch):
    """A group of two ranks, in the other of which the mean of g is 0.5."""
    group = SimpleNamespace(all_reduce=lambda x: x.add_(0.5), get_world_size=lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", group.all_reduce)
    monkeypatch.setattr(torch.distributed, "get_world_size", group.get_world_size)


def test_reference_point_is_the_weighted_mean_over_all_ranks_and_at_least_0(two_ranks):
    g = torch.tensor([0.1, 0.3, -0.7, -0.1])  # winners first
    point = methods.reference_point(g, 1.6, 0.4)
    assert point.item() == pytest.approx((0.8 * 0.2 + 0.2 * -0.4 + 0.5) / 2)
    assert methods.reference_point(g - 2, 1.6, 0.4) == 0
    # The clamp is on the mean of all ranks, not of each.
    assert methods.reference_point(g - 0.4, 1, 1).item() == pytest.approx((-0.5 + 0.5) / 2)
    assert methods.reference_point(g - 0.2, 1, 1).item() == pytest.approx((-0.3 + 0.5) / 2)


def test_liked_share_of_a_half_is_the_plain_mean(monkeypatch):
    group = SimpleNamespace(all_reduce=lambda x: None, get_world_size=lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", group.all_reduce)
    monkeypatch.setattr(torch.distributed, "get_world_size", group.get_world_size)
    err, err_ref = torch.tensor([0.8, 0.7, 1.0, 1.1]), torch.ones(4)
    kto, errors = methods.OBJECTIVES["kto"], methods.Errors(err, err_ref)
    losses, stats = kto.loss(SimpleNamespace(liked_share=0.5, beta=3.0), errors)
    plain, _ = kto_loss(err, err_ref, 3.0)
    assert torch.allclose(losses, plain) and stats["kl"].item() == pytest.approx(0.1)

    losses, stats = kto.loss(SimpleNamespace(liked_share=1.0, beta=3.0), errors)
    assert (losses[2:] == 0).all() and stats["kl"].item() == pytest.approx(0.25)


# -------------------------------------------------------------------------------------------------
# What reaches VAE and UNet, in a run of two steps of two micro-steps of two pairs by each method.


def watched_run(argv: list[str], out: Path) -> SimpleNamespace:
    """Run the script, and remember what it showed its models. calls: of the UNet; trained: those of
    the policy that a backward follows."""
    seen = SimpleNamespace(out=out, calls=[], x0=[], pixels=[], copies=0)
    predict, encode, start = model.predict_noise, model.encode_images, train_inpo.start_engine

    def spy_predict(unet, x, t, cond, *rest, **named):
        if x.device.type != "meta":  # there budget.py counts FLOPs
            grad = torch.is_grad_enabled()
            seen.calls.append(SimpleNamespace(unet=unet, x=x, t=t, cond=cond, grad=grad))
        return predict(unet, x, t, cond, *rest, **named)

    def spy_encode(pipeline, pixels, *rest):
        seen.pixels.append(pixels)
        seen.x0.append(encode(pipeline, pixels, *rest))
        return seen.x0[-1]

    def spy_start(*given):
        seen.policy, seen.reference = start(*given)
        return seen.policy, seen.reference

    def spy_copy(unet):
        seen.copies += 1
        return copy.deepcopy(unet)

    before = getrusage(RUSAGE_SELF).ru_maxrss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "predict_noise", spy_predict)
        patch.setattr(model, "encode_images", spy_encode)
        patch.setattr(train_inpo, "start_engine", spy_start)
        patch.setattr(train_inpo, "checked", lambda batches, *_: batches)  # one call more
        patch.setattr(train_inpo, "copy", SimpleNamespace(deepcopy=spy_copy))
        train_inpo.main(argv)
    seen.memory = before * 1024, getrusage(RUSAGE_SELF).ru_maxrss * 1024
    seen.trained = [call for call in seen.calls if call.grad]
    return seen


@pytest.fixture(scope="module")
def runs(command, tmp_path_factory) -> dict[str, SimpleNamespace]:
    """A watched run of each method, and of InPO with the reference as inverter; t in 10 cells."""
    asked = {method: flags_of(method) for method in TABLE}
    asked |= {method: asked[method] | {"strata": 10} for method in NOISE}
    asked["by reference"] = {"method": "inpo", "inverter": "reference"}
    folder, done = tmp_path_factory.mktemp("methods"), {}
    for name, flags in asked.items():
        flags = command(folder / name, **flags, lr=1e-4, caption_dropout=0.5)
        done[name] = watched_run(flags, folder / name)
    return done


def noises(seen: SimpleNamespace) -> list[torch.Tensor]:
    """The noise that each trained micro-batch of images holds, by the schedule's definition."""
    pairs = zip(seen.trained, seen.x0, strict=True)
    abar = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod
    found = []
    for call, x0 in pairs:
        a = abar[call.t].reshape(-1, 1, 1, 1)
        found.append((call.x - a.sqrt() * x0) / (1 - a).sqrt())
    return found


def text_of(call: SimpleNamespace) -> torch.Tensor:
    return call.cond["encoder_hidden_states"]


@pytest.mark.parametrize("method", ["inpo", "dpo", "kto"])
def test_winner_and_loser_share_timestep_and_caption(method, runs):
    dropped = []
    for call in runs[method].trained:
        assert call.t.shape == (4,) and torch.equal(call.t[:2], call.t[2:])
        assert torch.equal(text_of(call)[:2], text_of(call)[2:])
        dropped += (text_of(call)[:2] == 0).all(dim=(1, 2)).tolist()
    assert 0 < sum(dropped) < len(dropped)


def test_winner_and_loser_share_the_noise_in_dpo(runs):
    for noise in noises(runs["dpo"]):
        torch.testing.assert_close(noise[:2], noise[2:], rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", NOISE)
def test_no_other_images_share_a_noise(method, runs):
    found = noises(runs[method])
    images = torch.cat([noise[:2] for noise in found] if method == "dpo" else found)
    assert len(images) == {"dpo": 8, "kto": 16, "sft": 8}[method]
    for a, b in itertools.combinations(images, 2):
        assert (a - b).square().mean() > 1  # 2 for two standard normals
    assert abs(images.mean()) < 0.1 and abs(images.std() - 1) < 0.1


def test_methods_of_a_seed_share_images_captions_timesteps_and_noise(runs):
    """So that what tells two runs apart is the method."""
    inpo, dpo = runs["inpo"], runs["dpo"]
    for name, other in runs.items():
        for i in range(4):
            size = len(other.x0[i])
            assert size == (2 if name == "sft" else 4)
            assert torch.equal(other.x0[i], inpo.x0[i][:size])
            assert torch.equal(other.trained[i].t, inpo.trained[i].t[:size])
            assert torch.equal(text_of(other.trained[i]), text_of(inpo.trained[i])[:size])
            if name in NOISE:
                assert torch.equal(other.trained[i].x[:2], dpo.trained[i].x[:2])


def test_timesteps_of_a_micro_step_lie_in_one_cell_of_the_strata(runs):
    cells = [set((call.t // 100).tolist()) for call in runs["kto"].trained]
    assert all(len(cell) == 1 for cell in cells) and len(set.union(*cells)) == 4


def test_sft_never_shows_a_loser_to_vae_or_unet_and_builds_no_reference(runs):
    sft = runs["sft"]
    assert all(len(pixels) == 2 and (pixels >= 200).all() for pixels in sft.pixels)
    assert len(sft.calls) == 4 and all(call.unet is sft.policy for call in sft.calls)
    assert all(len(call.x) == len(call.t) == len(text_of(call)) == 2 for call in sft.calls)
    assert sft.reference is None and sft.copies == 0 and runs["dpo"].copies == 1
    line = metrics(sft.out)[1]
    always = {"step", "loss", "broken_pairs", "lr", "grad_norm", "seconds", "waiting"}
    always |= {"pairs_per_second"}
    always.add("skipped_steps")
    assert set(line) == always | {"err_winner"} and line["err_winner"] == line["loss"]


def test_the_reference_stays_where_the_policy_started(runs, checkpoint):
    start, seen = weights(checkpoint()), runs["inpo"]
    assert distance(seen.reference.state_dict(), start) == 0
    assert distance(seen.policy.module.state_dict(), start) > 1e-6


def test_the_reference_inverts_both_images_where_it_is_asked_to(runs):
    by_policy, by_reference = runs["inpo"], runs["by reference"]
    inverting = [call for call in by_reference.calls if not call.grad]
    assert len(inverting) == len([call for call in by_policy.calls if not call.grad]) > 8
    assert all(call.unet is by_reference.reference for call in inverting)
    assert all(len(call.x) == 4 for call in inverting)
    assert {call.unet is by_policy.policy for call in by_policy.calls} == {True, False}
    same = [
        torch.equal(a.x, b.x) for a, b in zip(by_policy.trained, by_reference.trained, strict=True)
    ]
    assert same == [True, True, False, False]  # the policy is the reference until it has moved


# -------------------------------------------------------------------------------------------------
# Timesteps without strata.


def test_without_strata_t_is_uniform_pair_by_pair():
    t = draw_timesteps(0, range(10_000), 8, 1, 1000)
    assert t.min() == 0 and t.max() == 999
    counts = torch.bincount(t // 20, minlength=50).float()
    assert 22 < ((counts - 200) ** 2 / 200).sum() < 86  # chi-squared, 49 degrees, 0.1 % to 99.9 %
    neighbours = torch.bincount((t[::2] // 100) * 10 + t[1::2] // 100, minlength=100).float()
    assert 59 < ((neighbours - 50) ** 2 / 50).sum() < 149  # 99 degrees of freedom


# -------------------------------------------------------------------------------------------------
# Recipes and flags.


@pytest.mark.parametrize(
    "preset, method, steps, batch, lr, warmup, beta",
    [
        ("sdxl", "inpo", 400, 1024, 1.024e-5, 200, 5000),
        ("sd15", "inpo", 400, 1024, 1.024e-5, 200, 2000),
        ("sdxl", "dpo", 2000, 2048, 2.048e-5, 200, 5000),
        ("sd15", "dpo", 2000, 2048, 2.048e-5, 500, 5000),
        ("sd15", "kto", 20_000, 4, 1e-7, 200, 1000),
        ("sdxl", "sft", 2000, 2048, 2.048e-5, 200, None),
        ("sd15", "sft", 2000, 2048, 2.048e-5, 500, None),
        ("sdxl", "smpo", 200, 1024, 1.024e-5, 100, 5000),
        ("sd15", "smpo", 200, 1024, 1.024e-5, 100, 2000),
        ("sdxl", "dmpo", 2000, 2048, 2.048e-6, 500, 6000),
        ("sd15", "dmpo", 2000, 2048, 2.048e-5, 500, 2000),
        ("sdxl", "mapo", 2000, 16, 1e-5, 0, 0.1),
        ("sd15", "dspo", 2000, 2048, 2.048e-5, 500, 0.001),
    ],
)
def test_defaults_are_the_published_recipes(preset, method, steps, batch, lr, warmup, beta):
    recipe = recipe_of(preset, method)
    numbers = [recipe[flag] for flag in ("steps", "batch", "lr", "warmup", "beta")]
    assert numbers == [steps, batch, lr, warmup, beta]
    assert recipe["data"] == "yuvalkirstain/pickapic_v2"
    assert recipe["caption_dropout"] == (0 if method == "mapo" else 0.2)
    assert recipe["liked_share"] == (0.8 if method == "kto" else None)
    inversion = [recipe[flag] for flag in ("inversion_steps", "eta", "inverter", "strata")]
    walked = {"inpo": [10, 0.1], "smpo": [10 if preset == "sdxl" else 5, 0]}
    own = walked.get(method)
    assert inversion == ([*own, "policy", None] if own else [None, None, None, 1])
    assert recipe["gamma"] == (10 if method == "smpo" else None)
    assert recipe["alpha"] == (0.01 if method == "dmpo" else None)
    args = parse("", [f"--model={preset}", f"--method={method}"])
    assert {flag: getattr(args, flag) for flag in recipe} == recipe


def test_out_is_named_after_model_and_method():
    for method in METHODS:
        assert parse("", ["--model=sd15", f"--method={method}"]).out == Path(f"out/sd15-{method}")
    assert parse("", ["--model=sd15"]).out == Path("out/sd15-inpo")
    assert parse("", ["--method=dpo", "--out=there"]).out == Path("there")


def test_help_names_every_method_and_its_recipe(capsys):
    with pytest.raises(SystemExit):
        train_inpo.main(["--help"])
    text = capsys.readouterr().out
    assert f"--method {{{','.join(TITLES)}}}" in text and {*METHODS} == {*TITLES}
    for method, number in (
        ("inpo", "1.024e-05"),
        ("dpo", "2.048e-05"),
        ("kto", "20000"),
        ("sft", "2000"),
        ("smpo", "200"),
        ("dmpo", "6000.0"),
        ("mapo", "1e-05"),
        ("dspo", "0.001"),
    ):
        (section,) = re.findall(
            rf"^  --method {method}\n(.*?)(?=^  --method|\Z)", text, re.M | re.S
        )
        assert number in section.split(), method
    for source in ("2503.18454", "2311.12908", "2404.04465"):
        assert source in text


@pytest.mark.parametrize(
    "method, flag, value",
    [
        ("dpo", "eta", 0.1), ("kto", "inversion_steps", 10), ("sft", "inverter", "policy"),
        ("dpo", "liked_share", 0.8), ("sft", "liked_share", 0.8), ("inpo", "liked_share", 0.8),
        ("sft", "beta", 500), ("inpo", "strata", 10), ("dpo", "eta", 0),
    ],
)  # fmt: skip
def test_a_flag_without_a_meaning_for_the_method_is_refused(method, flag, value, argv, capsys):
    sentence = refuse(argv(**flags_of(method) | {flag: value}), capsys)
    assert f"--{flag.replace('_', '-')}" in sentence and f"--method {method}" in sentence


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"method": "dpo", "strata": 7}, ["--strata 7", "1000"]),
        ({"method": "smpo"}, ["--objective smpo", "of 24 of 24 pairs how surely"]),
        ({"method": "kto", "safe_loser": 0.5}, ["--safe-loser", "objective kto"]),
        ({"method": "dpo", "safe_loser": 2}, ["--safe-loser 2"]),
        ({"method": "dspo", "held_out": 0.2}, ["--held-out: the objective dspo needs more"]),
        (
            {"method": "mapo", "latents": "inversion", "inverter": "reference"},
            ["--inverter reference: the objective mapo has no reference; leave it out."],
        ),
        ({"method": "dmpo", "alpha": 0}, ["--alpha 0"]),
        ({"method": "dmpo", "gamma": 2}, ["--gamma", "--method dmpo"]),
        ({"method": "kto", "strata": 0}, ["--strata 0"]),
        ({"method": "kto", "liked_share": 1.5}, ["--liked-share 1.5"]),
        ({"method": "kto", "beta": 0}, ["--beta 0"]),
        ({"method": "dpo", "export_every": -1}, ["--export-every -1"]),
    ],
)
def test_a_value_out_of_range_is_refused(flags, words, argv, tmp_path, capsys):
    sentence = refuse(argv(**flags), capsys)
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "run").exists()


def test_an_unknown_method_is_refused_with_the_known_ones(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        train_inpo.main(argv(method="ipo"))
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and all(word in error for word in ("--method", "ipo", *METHODS))


def test_a_folder_with_a_run_of_another_method_is_refused(runs, argv, capsys):
    command = argv(out=runs["dpo"].out, method="kto")
    assert "method: dpo there, kto now" in refuse(command, capsys)


@pytest.mark.parametrize(
    "flags, calls, words",
    [
        # 50 steps x 8 pairs, and for each image ...
        ({"method": "inpo"}, "7,600", ["InPO"]),  # 800 x (5.5 + 1 + 3)
        ({"method": "inpo", "inversion_steps": 5, "inverter": "reference"}, "5,600", ["reference"]),
        ({"method": "dpo"}, "3,200", ["Diffusion-DPO: pairwise loss, beta 500"]),  # 800 x (1 + 3)
        ({"method": "dpo", "strata": 10}, "3,200", ["Diffusion-DPO"]),
        ({"method": "kto"}, "3,200", ["Diffusion-KTO: utility", "beta 500", "80%"]),
        ({"method": "sft", "beta": None}, "1,200", ["winners"]),  # 400 x 3
    ],
)
def test_dry_run_counts_the_calls_of_each_method(flags, calls, words, argv, tmp_path, capsys):
    train_inpo.main([*argv(**flags, steps=50, batch=8), "--dry-run"])
    text = capsys.readouterr().out
    assert f" {calls} in all" in text and all(word in text for word in words), text
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------
# cost.json and the model card.


def flops_of_a_call(folder: Path, size: int = 8) -> int:
    """Counted on a real forward of one image, on the CPU."""
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    text, _, pooled, _ = pipe.encode_prompt("a red circle", do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)}
    x = torch.zeros(1, 4, size, size)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pipe.unet(x, torch.tensor([5]), text, added_cond_kwargs=added)
    return counter.get_total_flops()


def test_cost_counts_the_calls_that_were_made_and_their_flops(runs, checkpoint):
    call = flops_of_a_call(checkpoint())
    assert call > 1e6
    for name, seen in runs.items():
        made = sum(len(one.x) * (3 if one.grad else 1) for one in seen.calls)
        cost = cost_of(seen.out)
        assert cost["unet_calls"] == made, name
        assert cost["flops"] == pytest.approx(made * call, rel=1e-9)
        assert (cost["steps"], cost["pairs"]) == (2, 8) and cost["method"] == name.replace(
            "by reference", "inpo"
        )


def test_cost_tells_time_device_and_memory(runs):
    for seen in runs.values():
        cost = cost_of(seen.out)
        assert cost["seconds"] == pytest.approx(sum(line["seconds"] for line in metrics(seen.out)))
        assert 0 < cost["seconds"] < 600 and (cost["devices"], cost["device"]) == (1, "CPU")
        assert cost["device_hours"] == pytest.approx(cost["seconds"] / 3600)
        lowest, highest = seen.memory  # bytes, before and after the run
        assert 2**20 < lowest <= cost["peak_memory"] <= highest < 2**40


@pytest.mark.parametrize("method", TABLE)
def test_cost_does_not_depend_on_the_number_of_ranks(method, argv, checkpoint, monkeypatch):
    work = []
    for ranks in (1, 2):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        args = parse("", argv(**flags_of(method), steps=7, micro_batch=2 // ranks))
        work.append(budget.work_done(args, plan.check(args)))
    assert work[0] == work[1] and work[0]["unet_calls"] > 0


def test_flops_are_those_of_the_resolution_that_was_trained(argv, checkpoint, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    args = parse("", argv(method="dpo", resolution=32))
    work = budget.work_done(args, plan.check(args))
    assert work["flops"] == pytest.approx(2 * 8 * 4 * flops_of_a_call(args.model, size=16))


@pytest.fixture
def takes(monkeypatch):
    """takes(seconds, where, name): a clock moves when where.name is called; takes.now[0] is it."""
    now = [0.0]
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def takes(seconds, where, name):
        true = getattr(where, name)

        def slow(*given, **named):
            meta = name == "predict_noise" and given[1].device.type == "meta"
            now[0] += 0 if meta else seconds
            return true(*given, **named)

        monkeypatch.setattr(where, name, slow)

    takes.now = now
    return takes


def test_time_is_that_of_the_steps_alone(argv, tmp_path, monkeypatch, takes):
    takes(1, model, "predict_noise")
    takes(100, model, "sample")
    takes(1000, saving, "save_unet")
    takes(10_000, deepspeed.DeepSpeedEngine, "save_checkpoint")
    monkeypatch.setattr(preview, "STEPS", 2)
    train_inpo.main(argv(method="dpo", sample_every=2, export_every=1, checkpoint_every=1))
    checked, drawn = 1, 2 * 100  # pictures in one batch
    assert takes.now[0] == 8 + checked + drawn + 2 * 1000 + 2 * 10_000
    lines = metrics(tmp_path / "run")
    assert [(line["seconds"], line["pairs_per_second"]) for line in lines] == [(4, 1), (4, 1)]
    assert {line["waiting"] for line in lines} == {0}
    assert cost_of(tmp_path / "run")["seconds"] == 8


def test_waiting_is_the_share_of_a_step_that_pictures_take(argv, tmp_path, takes):
    takes(1, model, "predict_noise")
    takes(2, data, "read_pair")
    train_inpo.main(argv(method="dpo", sample_every=0))
    lines = metrics(tmp_path / "run")
    assert [line["seconds"] for line in lines] == [4 + 4 * 2] * 2  # of four pairs
    assert [line["waiting"] for line in lines] == pytest.approx([8 / 12] * 2)


def test_the_model_card_names_the_method(runs):
    titles = {
        "inpo": "DDIM-InPO (Lu et al., CVPR 2025, arXiv 2503.18454)",
        "dpo": "Diffusion-DPO (arXiv 2311.12908)",
        "kto": "Diffusion-KTO (arXiv 2404.04465)",
        "sft": "supervised fine-tuning",
    }
    for method, title in titles.items():
        card = (runs[method].out / "README.md").read_text()
        assert f"\n- {method}\n" in card.split("---")[1] and f"-{method}\n" in card
        assert [other for other in titles.values() if other in card] == [title]
