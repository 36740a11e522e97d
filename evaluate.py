"""Judge models side by side: images -> scores -> win rates -> table and picture.

From two checkpoints to the table; here the demo's, in a minute on a CPU:

    python evaluate.py --models base=tiny aligned=out/demo/aligned --prompts toy --seeds 16 \\
                       --out out/demo

The published comparison, a look at 100 of its prompts, and all of it on 8 GPUs (every command runs
under torchrun or deepspeed too, and writes the same files):

    python evaluate.py --models base=sdxl inpo=JaydenLu666/InPO-SDXL --prompts parti
    python evaluate.py --models base=sdxl inpo=out/sdxl-inpo --prompts parti --limit 100 \\
                       --out out/look
    torchrun --nproc_per_node 8 evaluate.py --prompts hpdv2 parti --models base=sdxl \\
                       dpo=mhdang/dpo-sdxl-text2image-v1 inpo=JaydenLu666/InPO-SDXL

A model is a diffusers pipeline (folder, hub id; sdxl, sd15, tiny), also in one .safetensors file in
the original layout; a UNet or a LoRA, which is put into --base; or a folder of images, drawn here
before (it has a manifest.json) or elsewhere (PNG or JPEG files: in natural order file k shows
prompt k mod P of the P of --prompts):

    python evaluate.py --models base=sdxl lora=out/lora/pytorch_lora_weights.safetensors \\
                       --prompts parti
    python evaluate.py --models ours=out/eval/images/parti/inpo theirs=pictures/parti

A scorer is one of those below, a function of yours that takes pictures and prompts and gives a
number for each (docs/judges.md), or none: then there are pictures and no scores:

    python evaluate.py --models base=sdxl inpo=out/sdxl-inpo --prompts mine.txt \\
                       --scorers mine.py:sharpness pickscore

The first model is the baseline. Every model draws the same prompts from the same initial noise, so
images pair up; a win rate is the share of pairs that a model wins. Each prompt has its own seed,
shared by all models; one seed across prompts would correlate them, and make intervals too narrow.
The same command continues an interrupted one, to the same bytes; other settings or weights for the
same folder are refused. A table of other models is kept under its date. Under --out stand

    images/SET/NAME/00000.png ...    image k: prompt k mod P of P prompts, from seed first_seed + k
    images/SET/NAME/manifest.json    model, settings, and prompt and seed of each image
    index.html     the table, and all pictures side by side, for a browser; blind/index.html: a
                   judgement of people, who save votes.json (docs/page.md)
    scores.json    {SET: {images: [{prompt, seed, category}], files: {NAME: [file, ...]},
                   scores: {NAME: {SCORER: [a number per image, ...]}}}}
    results.json   {models: {NAME: {model, base, architecture, size (pixels), identity}},
                   sets: {SET: {prompts, images, steps, guidance, dtype, first_seed}}, null where
                       not known of all models,
                   scores: [{set, scorer, model, n, mean, median, low, high, change, change_low,
                       change_high}, ...], change: the mean difference from the first model,
                   win_rates: [{set, scorer, category, model, against, wins, losses, ties, n, rate,
                       low, high, published}, ...], category null: all images; published: in %,
                   costs: {NAME: cost.json of the model's folder},
                   people: {SET: {judges: {NAME: votes}, pairs, shared, alpha, left, agreement}}
                       of --votes, see people.py,
                   functions: {SCORER: digest of its file} of yours}, low, high: 95 % intervals
    table.md       the same for people
    SET.png        rows: prompts, evenly spaced over the set; columns: models
"""

import argparse
import os
import re
from pathlib import Path
from typing import NamedTuple

from evaluation import own
from evaluation.published import PUBLISHED_SCORERS, TITLES, TOY
from system.files import UserError
from system.hub import add_model_flags, check_local, say_of_files
from system.program import Parser, reported

NAME = r"\w[\w.+-]*"  # of a model or prompt set: it becomes a folder


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, and {name: path} of the models. Raises UserError for wrong ones."""
    parser = Parser("evaluate.py", __doc__)
    # fmt: off

    add = parser.add_argument_group("what is judged").add_argument
    add("--models", nargs="+", required=True, metavar="NAME=PATH",
        help="two or more, the baseline first: pipelines, UNets, LoRAs or folders of images")
    add("--base", metavar="PATH",
        help="pipeline of the UNets and LoRAs (default: the first pipeline among the models)")
    add_model_flags(add)
    add("--prompts", nargs="+", metavar="SET",
        help="one or more of toy, hpdv2, hpdv2-test, parti (or parti=PATH of a local copy), .txt "
             "files, a prompt a line, and .tsv files with the columns Prompt and Category "
             "(default: those of a folder of images drawn here, else toy for tiny models)")
    add("--limit", type=int, metavar="N",
        help="judge N prompts of each set, evenly spaced (default: all)")
    add("--scorers", nargs="+", type=own.choice(*TITLES, "none"), metavar="SCORER",
        help=f"one or more of {', '.join(TITLES)} and FILE.py:FUNCTION, or none (default: "
             f"{' '.join(TOY)} for toy captions, else {' '.join(PUBLISHED_SCORERS)})")
    add("--scorer-folder", type=Path, metavar="FOLDER",
        help="copies of the scorers' hub repositories, as FOLDER/owner/name (default: the hub)")

    add("--votes", nargs="+", type=Path, default=[], metavar="FILE",
        help="votes.json of people, a file a judge, as blind/index.html under --out saves it: adds "
             "people as a scorer; scores that are there are not computed again")

    add = parser.add_argument_group("how images are drawn").add_argument
    add("--seeds", type=int, default=1, metavar="N", help="images per prompt and model")
    add("--first-seed", type=int, default=0, metavar="N",
        help="seed of the first image; the next ones count up")
    add("--steps", type=int, metavar="N",
        help="sampling steps per image (default: tiny 12, others 50)")
    add("--guidance", type=float, metavar="W",
        help="classifier-free guidance scale, 1 = none (default: tiny 2, SDXL 5, SD1.5 7.5)")
    add("--batch", type=int, metavar="N",
        help="images per call of a model (default: SDXL 4, others 16)")

    add = parser.add_argument_group("what is written").add_argument
    add("--out", type=Path, default=Path("out/eval"), metavar="FOLDER",
        help="folder for images, scores, tables and pictures")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    # fmt: on
    args = parser.parse_args(argv)
    check_flags(args)
    args.models = name_models(args.models)
    for path in [*args.models.values(), *([args.base] if args.base else [])]:
        check_local(path)
    say_of_files([*args.models.values(), *([args.base] if args.base else [])], args)
    return args


def check_flags(args: argparse.Namespace):
    least = {"seeds": 1, "first_seed": 0, "steps": 1, "batch": 1, "limit": 1, "guidance": 1}
    for option, low in least.items():
        if getattr(args, option) is not None and getattr(args, option) < low:
            raise UserError(f"--{option.replace('_', '-')} must be at least {low}.")
    args.scorers = args.scorers and own.distinct(args.scorers)
    if "none" in (args.scorers or []) and len(args.scorers) > 1:
        raise UserError("--scorers none: draws without scores; leave the other scorers out.")


def name_models(texts: list[str]) -> dict[str, str]:
    """{"base": "out/run", ...} of "base=out/run"; a bare path is named by its last part."""
    models = {}
    for text in texts:
        name, path = text.split("=", 1) if "=" in text else (Path(text).name, text)
        if not path or not re.fullmatch(NAME, name):
            words = "letters, digits, _ . + and -"
            raise UserError(f"'{text}' is not NAME=PATH with a NAME of {words}.")
        if name.casefold() in map(str.casefold, models):  # folders of some systems ignore case
            raise UserError(f"two models are named '{name}'; tell them apart with NAME=PATH.")
        models[name] = path
    if len(models) < 2:
        raise UserError("--models needs at least two models, the baseline first.")
    return models


if __name__ == "__main__":  # --help and wrong flags are answered before the seconds of imports
    with reported("evaluate.py"):
        parse()

import torch

import toy
from evaluation import gallery, people, scorers, tables, votes, winrate, written
from evaluation.gallery import generate, score
from evaluation.models import choose_settings, family, free, load, precision
from evaluation.prompts import PromptSet
from evaluation.prompts import read as read_prompts
from system import hub, processes
from system.lock import alone, lock
from system.processes import print0
from weights import loading

# --------------------------------------------------------------------------------------------------
# Checks: what a user can get wrong is said before a model draws.


class Source(NamedTuple):
    """A model's images for a prompt set: there already, or to be drawn into the folder."""

    folder: Path
    manifest: dict
    draws: bool


Found = dict[str, dict[str, Source]]  # {prompt set: {model: its images}}


def check(args: argparse.Namespace) -> tuple[Found, list[str], list[votes.Vote]]:
    """(what is judged, by which scorers, by which votes). Raises UserError.

    What is cheap to check comes first. In the end every model that draws is loaded once: its
    weights are there, fit together, and are those that drew what its folders already hold."""
    check_out(args.out)
    votes.needs_library(args.votes)
    models = args.models
    given = {name: Path(path) for name, path in models.items() if gallery.is_gallery(path)}
    kinds = {name: hub.kind(path) for name, path in models.items() if name not in given}
    first = next((models[name] for name, kind in kinds.items() if kind == "pipeline"), None)
    if args.base and hub.kind(args.base) != "pipeline":
        raise UserError(f"--base '{args.base}' is no pipeline; name a folder or hub id of one.")
    bases = {n: None if kind == "pipeline" else args.base or first for n, kind in kinds.items()}
    around = {name: loading.pipeline_of(models[name], base) for name, base in bases.items()}
    families = {name: family(pipeline) for name, pipeline in around.items()}
    settings = choose_settings(args, families)

    sets = read_sets(args.prompts, given, set(families.values()) == {"tiny"})
    every = [prompt for prompts in sets for prompt in prompts.prompts]
    usual = TOY if set(every) <= set(toy.prompts()) else PUBLISHED_SCORERS
    judges = [scorer for scorer in args.scorers or usual if scorer != "none"]
    try:
        for scorer in judges:
            scorers.check(scorer, every, args.scorer_folder)
    except UserError as error:
        if args.scorers:
            raise
        raise UserError(
            f"{str(error)[:-1]}; or give --scorers none, for pictures alone."
        ) from error

    found = {}
    for prompts in sets:
        images = gallery.plan_images(prompts, args.seeds, args.first_seed, args.limit)
        asked = {"set": prompts.name, "prompts": len(images) // args.seeds, "images": images}
        row = found[prompts.name] = {}
        for name, path in models.items():
            if name in given:
                manifest = gallery.read_pictures(given[name], prompts, args.limit)
                row[name] = Source(given[name], manifest, False)
                continue
            about = {"name": name, "model": path, "base": bases[name], "dtype": precision()}
            about |= {"architecture": hub.architecture(around[name])} | settings[name] | asked
            row[name] = Source(args.out / "images" / prompts.name / name, about, True)
        gallery.refuse_mixing({name: source.manifest for name, source in row.items()})
    read_votes(args.votes, found)  # what is wrong with them is said before weights are loaded
    for name in models:
        read_cost(found[sets[0].name][name].manifest.get("model"))
        identify(name, found)
        free()
    return found, judges, read_votes(args.votes, found)


def read_votes(paths: list[Path], found: Found) -> list[votes.Vote]:
    """The votes of these files. Raises UserError."""
    manifests = {key: [s.manifest for s in row.values()] for key, row in found.items()}
    images = {key: some[0]["images"] for key, some in manifests.items()}
    first = next(iter(found.values()))
    identities = {name: source.manifest.get("identity") for name, source in first.items()}
    return votes.read(paths, images, identities)


def identify(name: str, found: Found):
    """Complete a model's manifests from its weights; UserError where others drew its images."""
    pipeline = None
    for row in found.values():
        folder, about, draws = row[name]
        if draws:
            pipeline = pipeline or load(about)
            row[name] = Source(folder, gallery.describe(pipeline, **about), draws)
            gallery.refuse_others(folder, row[name].manifest)


def check_out(out: Path):
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise UserError(f"--out '{out}' is a file, or lies in one, and must be a folder.")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"--out '{out}' cannot be written; name a folder of yours.")
    if out.is_dir():
        os.close(lock(out))  # another job that is writing there is told of before models load


def read_sets(sources: list[str] | None, given: dict[str, Path], tiny: bool) -> list[PromptSet]:
    """--prompts; without, those of the first manifest among the folders of images, or toy's."""
    manifests = [m for folder in given.values() if (m := gallery.read_manifest(folder))]
    if not sources and not manifests and (given or not tiny):
        raise UserError("--prompts is needed: parti, hpdv2, or a .txt file, a prompt a line.")
    if not sources and manifests:
        sets = [gallery.prompts_of(manifests[0])]
    else:
        sets = [read_prompts(source) for source in sources or ["toy"]]
    for prompts in sets:
        if not re.fullmatch(NAME, prompts.name):
            raise UserError(
                f"the prompt set '{prompts.name}' cannot name a folder; rename its file."
            )
        if [p.name.casefold() for p in sets].count(prompts.name.casefold()) > 1:
            raise UserError(f"two of --prompts are named '{prompts.name}'; rename a file.")
    if given and len(sets) > 1:
        raise UserError("--prompts must be a single set where a folder of images is judged.")
    return sets


def read_cost(path: str | None) -> dict | None:
    """cost.json of the folder of a model, if it has one; UserError where it is damaged."""
    place = Path(path or "")
    return tables.read_cost(place.parent if place.is_file() else place) if path else None


# --------------------------------------------------------------------------------------------------
# The work: draw, judge, report.


def draw(name: str, sources: list[Source]):
    """Draw a model's images that are missing; the model is loaded only if there are any."""
    drawn = [source for source in sources if source.draws]
    if not any(processes.gather(any(gallery.missing(s.folder, s.manifest) for s in drawn))):
        return
    pipeline = processes.together(lambda: load(drawn[0].manifest).to(gallery.device()))
    for folder, manifest, _ in drawn:
        generate(pipeline, folder, manifest, f"{manifest['set']} by {name}")


def judge(scorer: str, folder: Path | None, found: Found) -> dict:
    """{prompt set: {model: a number per image}}."""
    judge = processes.together(lambda: scorers.load(scorer, folder, gallery.device()))
    said = own.title(scorer)
    return {
        key: {
            name: score(source.folder, source.manifest["images"], judge, f"{said} of {name}")
            for name, source in row.items()
        }
        for key, row in found.items()
    }


def report(
    found: Found,
    judged: dict[str, dict],
    out: Path,
    functions: dict[str, str],
    cast: list[votes.Vote] | None = None,
) -> dict:
    """Write and print what the docstring lists; judged: {scorer: {set: {model: numbers}}}; cast:
    the votes of people, if there are any."""
    models = {name: source.manifest for name, source in next(iter(found.values())).items()}
    keys = ("model", "base", "architecture", "size", "identity")
    costs = {name: read_cost(manifest.get("model")) for name, manifest in models.items()}
    results = {"models": {n: {key: m.get(key) for key in keys} for n, m in models.items()}}
    results |= {"sets": {}, "scores": [], "win_rates": []}
    results["costs"] = {name: cost for name, cost in costs.items() if cost}
    results |= {"functions": functions} if functions else {}
    results |= {"people": {}} if cast else {}
    kept = {}
    for key, row in found.items():
        results["sets"][key] = gallery.shared([source.manifest for source in row.values()])
        images = next(iter(row.values())).manifest["images"]
        scores = {name: {scorer: judged[scorer][key][name] for scorer in judged} for name in row}
        prompts, categories = ([e.get(k) for e in images] for k in ("prompt", "category"))
        categories = categories if all(categories) else None
        averages, rates = winrate.summarize(key, scores, prompts, categories, results)
        results["scores"] += averages
        results["win_rates"] += rates
        if mine := [vote for vote in cast or () if vote.set == key]:
            results["win_rates"] += people.records(key, mine, list(row), prompts, categories)
            results["people"][key] = people.about(key, mine, scores, prompts)
        files = {n: [e["file"] for e in source.manifest["images"]] for n, source in row.items()}
        shown = [{k: v for k, v in entry.items() if k != "file"} for entry in images]
        kept[key] = {"images": shown, "files": files, "scores": scores}
    folders = {key: {n: source.folder for n, source in row.items()} for key, row in found.items()}
    written.save(out, kept, results, folders, cast or [])
    return results


def run(args: argparse.Namespace) -> dict:
    """All of it, on every rank; the contents of results.json."""
    place = processes.together(gallery.device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    found, judges, cast = processes.on_main(lambda: check(args))
    for key, row in found.items():
        drawn = {name: gallery.traits(source.manifest) for name, source in row.items()}
        if unknown := [name for name, traits in drawn.items() if None in traits.values()]:
            how = f"note: with which seeds and settings {', '.join(unknown)} drew {key}"
            print0(f"{how} is not fully known; the images are compared as they are.")
    with alone(args.out):
        for name in args.models:
            draw(name, [row[name] for row in found.values()])
            free()
        titles, functions, there = list(map(own.title, judges)), own.digests(judges), {}
        if args.votes:
            there = processes.on_main(lambda: written.scores(args.out, found, titles, functions))
        judged = {}
        for scorer, title in zip(judges, titles, strict=True):
            judged[title] = there.get(title) or judge(scorer, args.scorer_folder, found)
            free()
        return processes.on_main(lambda: report(found, judged, args.out, functions, cast))


def main(argv: list[str] | None = None) -> dict:
    with reported("evaluate.py"):
        args = parse(argv)
        with processes.joined():
            return run(args)


if __name__ == "__main__":
    main()
