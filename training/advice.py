"""What runs, but perhaps not as its user thinks: settings and captions, seen before the first step.

Captions are those of the pairs that the plan has decoded, some 64 of all.
"""

from argparse import Namespace
from collections.abc import Iterator

from training import held_out, lora
from training.methods import OBJECTIVES
from training.recipes import recipe_of
from weights import loading

# As many as sd-scripts' examples of LoRA take. In docs/small_sets.md the loss on held-out pairs is
# lowest at the first look, after 11.
EPOCHS = 10
FEW = 25  # held-out pairs: the standard error of their accuracy is 10 points


def settings(args: Namespace, plan) -> Iterator[str]:
    """Of steps, latents, warm-up, resolution and adapters. plan: a plan.Plan."""
    epochs = args.steps * args.batch / len(plan.pairs)
    if epochs > EPOCHS:
        fits = max(1, EPOCHS * len(plan.pairs) // args.batch)
        shown = "held_out_loss shows" if args.held_out else "--held-out 0.1 would show"
        yield (
            f"the run sees each pair {epochs:,.0f} times, and a small set is learnt by heart long "
            f"before; give --steps {fits} ({EPOCHS} epochs) or fewer; {shown} when that happens."
        )
    if 0 < (held := held_out.count(args, plan)) < FEW:
        yield (
            f"--held-out {args.held_out}: an accuracy on {held} pairs is known to about "
            f"{50 / held**0.5:.0f} points; hold out {FEW} or more."
        )
    alone = not OBJECTIVES[args.objective].pairwise and args.liked_share != 0.5
    if args.latents != "noise" and alone:  # winners pull more than losers push
        yield (
            f"--objective {args.objective} --latents {args.latents}: on inverted latents the tiny "
            "model learnt to agree with its own inversion, and lost the captions (docs/tune.md); "
            "give --latents noise, an objective of pairs, or kto with --liked-share 0.5."
        )
    if args.warmup > args.steps:
        yield (
            f"the warm-up of {args.warmup} steps is longer than the run, whose lr ends at "
            f"{args.lr * args.steps / args.warmup:.3g} in place of {args.lr:g}; give --warmup "
            f"{args.steps // 10}."
        )
    own = plan.unet_config["sample_size"] * plan.factor
    if plan.resolution != own:
        yield (
            f"--resolution {plan.resolution}: the model draws at {own} px, where what it learns at "
            "another size may not hold; leave the flag out."
        )
    published = recipe_of(args.model, args.method)
    same = all(getattr(args, flag) == published[flag] for flag in ("steps", "batch", "lr"))
    if lora.trains_adapters(args) and same:
        yield (
            f"adapters are trained by the recipe of whole models, {args.steps * args.batch:,} "
            f"pairs at lr {args.lr:g}; --recipe lora has one of their own."
        )


def captions(args: Namespace, plan) -> Iterator[str]:
    """Of captions that say nothing to the model, or not all that they say."""
    texts, count = [text for text in plan.captions if text.strip()], len(plan.captions)
    if count and not texts:
        yield (
            f"--data {args.data}: all of {count} captions are empty, so that the pairs are trained "
            "without one; fill the column caption."
        )
    if not texts:
        return
    try:
        tokenizer = loading.load_tokenizer(args.model)
    except Exception:  # of transformers and the hub; loading the pipeline will tell
        return
    tokens = tokenizer(texts, add_special_tokens=False).input_ids
    limit, unknown = tokenizer.model_max_length, tokenizer.unk_token_id
    strange = [x for x, ids in zip(texts, tokens, strict=True) if not set(ids) - {unknown}]
    if strange:
        yield (
            f"{len(strange)} of {count} captions have no token that the tokenizer of {args.model} "
            f"knows ('{shortened(strange[0])}'); to the model they say nothing."
        )
    long = [x for x, ids in zip(texts, tokens, strict=True) if len(ids) + 2 > limit]
    if long:
        yield (
            f"{len(long)} of {count} captions have more tokens than the {limit} that the model "
            f"reads, whose first and last are marks ('{shortened(long[0])}'); the rest is cut off."
        )


def shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."
