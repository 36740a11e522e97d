"""Laws of recipes.py and advice.py: adapters have a recipe of their own, and what would burn hours
unseen is said before the first step, in one sentence each."""

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from system.hub import PRESETS
from training import advice, plan
from training.flags import check_flags, parse
from training.recipes import COLUMNS, METHODS, recipe_of

# -------------------------------------------------------------------------------------------------
# The recipe.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", COLUMNS)
def test_adapters_for_a_small_set_have_a_recipe_that_any_flag_overrides(preset, method):
    words = [f"--model={preset}", f"--method={method}", "--recipe=lora", "--data=toy"]
    args, own = parse("", words), recipe_of(preset, method, "lora") | {"data": "toy"}
    assert {flag: getattr(args, flag) for flag in own} == own and args.lora_rank > 0
    assert args.lora_alpha == args.lora_rank and args.ds_config == "configs/zero1.json"
    whole = parse("", words[:2])
    assert args.beta == whole.beta
    if method != "mapo":  # whose two scripts are launched with one learning rate
        assert args.lr / args.batch > whole.lr / whole.batch
    assert args.steps * args.batch <= 32_000 and args.batch % args.micro_batch == 0
    check_flags(args)
    changed = parse("", [*words, "--lora-rank=4", "--lr=3e-3", "--steps=7", "--batch=6"])
    assert (changed.lora_rank, changed.lr, changed.steps, changed.batch) == (4, 3e-3, 7, 6)
    assert changed.warmup == args.warmup and str(args.out) == f"out/{preset}-{method}-lora"


def test_a_lora_that_is_trained_on_keeps_its_rank_under_the_recipe():
    words = ["--model=sdxl", "--recipe=lora", "--data=toy", f"--lora={PRESETS['tiny']}"]
    check_flags(on := parse("", words))
    merged = parse("", [*words, "--lora-start=merge"])
    assert (on.lora_rank, merged.lora_rank) == (0, 8) and on.steps == merged.steps == 1000


def test_the_recipe_of_a_hub_id_is_that_of_its_architecture(checkpoint):
    folder = checkpoint("sd15")
    assert recipe_of(str(folder), "inpo", "lora") == recipe_of("sd15", "inpo", "lora")


# -------------------------------------------------------------------------------------------------
# Settings.


@pytest.fixture
def said(argv):
    """said(word, ..., flag=value, ...) -> the warnings of a run of 24 pairs, 16 px."""

    def get(*words: str, **flags) -> list[str]:
        args = parse("", [*argv(**flags), *words])
        return list(plan.warnings(args, plan.check(args)))

    return get


def test_many_epochs_are_warned_about_with_the_steps_that_make_fewer(said):
    most = advice.EPOCHS * 24 // 4
    assert said(steps=most) == []
    (sentence,) = said(steps=2 * most)
    assert f"each pair {2 * advice.EPOCHS} times" in sentence
    assert f"give --steps {most} (" in sentence and "--held-out 0.1 would show" in sentence


def test_few_held_out_pairs_are_warned_about(said, pairs, tmp_path):
    many = tmp_path / "many.parquet"
    pq.write_table(pa.concat_tables([pq.read_table(pairs)] * 2), many)
    assert said(held_out=many) == [] == said(held_out=0.6, data=many)
    for value in (0.4, pairs):
        (sentence,) = said(held_out=value, data=pairs if value == 0.4 else many)
        assert sentence.startswith(f"--held-out {value}: an accuracy on ") and "points" in sentence


def test_a_warm_up_that_outlasts_the_run_is_warned_about(said):
    assert said(warmup=20, steps=20) == []
    (sentence,) = said(warmup=40, steps=20, lr=1e-3)
    assert "ends at 0.0005 in place of 0.001; give --warmup 2." in sentence


def test_inverted_latents_without_the_loss_of_a_pair_are_warned_about(said):
    even = "--method=kto --latents=inversion --liked-share=0.5"
    for words in ("--method=inpo", "--method=kto", "--method=mapo --latents=inversion", even):
        assert said(*words.split(), beta=None) == []
    for objective in ("kto", "sft"):
        (sentence,) = said("--latents=inversion", method=objective, beta=None)
        assert sentence.startswith(f"--objective {objective} --latents inversion: on inverted")


def test_a_resolution_that_is_not_the_models_own_is_warned_about(said):
    assert said(resolution=16) == []
    (sentence,) = said(resolution=32)
    assert sentence.startswith("--resolution 32: the model draws at 16 px")


def test_adapters_under_the_recipe_of_whole_models_are_warned_about(said, checkpoint):
    whole = {"steps": None, "batch": None, "lr": None, "warmup": None, "lora_rank": 4}
    sentences = said(**whole)
    assert any("409,600 pairs at lr 1.024e-05; --recipe lora" in x for x in sentences)
    for flags in (whole | {"lr": 1e-3}, whole | {"lora_rank": 0}, whole | {"recipe": "lora"}):
        assert not any("--recipe lora" in x for x in said(**flags))


# -------------------------------------------------------------------------------------------------
# Captions: the tokenizer of the tests knows letters, no digits, and reads 16 tokens.


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    "captions, words",
    [
        (["", " ", "", "\n"], "all of 4 captions are empty"),
        (["123", "a red circle", "4 5", ""], "2 of 4 captions have no token that the"),
        (
            ["a " * 14, "a " * 15, "a " * 60, ""],
            "2 of 4 captions have more tokens than the 16",
        ),
        (["a " * 14, "", "red 4"], None),
    ],
)
def test_captions_that_the_model_cannot_read_are_counted(
    captions, words, dry, said, pairs, tmp_path
):
    table = pq.read_table(pairs).slice(0, len(captions))
    source = tmp_path / "captions.parquet"
    column = pa.array(captions, pa.string())
    pq.write_table(table.set_column(table.column_names.index("caption"), "caption", column), source)
    sentences = said(*["--dry-run"] * dry, data=source)
    assert len(sentences) == (words is not None)
    assert all(words in sentence and sentence.endswith(".") for sentence in sentences)


def test_a_tokenizer_that_is_not_there_is_no_reason_to_stop_or_warn(argv, tmp_path):
    args = parse("", argv())
    found = dataclasses.replace(plan.check(args), captions=["123"])
    assert len(list(advice.captions(args, found))) == 1
    for args.model in (tmp_path, "no/such/model"):  # a folder without one, and none
        assert list(advice.captions(args, found)) == []
