"""What a study writes: NAME.md (tables), NAME.json (win rates), its judgements, and pictures."""

import re
import shutil
from pathlib import Path

import toy
from evaluation import figures, tables
from lab import report, tuning
from system.files import UserError, write_section

PROMPTS = toy.prompts("heldout")
TRADE = [("drift", "preference"), ("preference", "faithfulness")]  # what is gained, and its price


def seeds_of(results: report.Results) -> str:
    return f"training seeds {', '.join(map(str, results.seeds))}"


def write_groups(results: report.Results, jobs: list, out: Path, common: list[str]) -> str:
    """A table and panels for each group of variants, with the common variants before its own.

    Where there are common ones, a second table shows scores where all have moved equally far."""
    groups, panels, text = {}, [], ""
    for job in jobs[1:]:
        if job.variant.group and job.seed == results.seeds[0]:
            groups.setdefault(job.variant.group, list(common)).append(job.variant.name)
    for heading, names in groups.items():
        for panel in report.panels(results, names, TRADE):
            panels.append(panel | {"title": heading})
        text += f"## {heading}\n\n{report.scores_table(results, -1, names)}\n"
        if common:  # among variants of one recipe
            text += f"{report.matched_table(results, names)}\n"
    title = f"Variants of the tiny model, {seeds_of(results)}"
    figures.trajectories(panels, out.with_suffix(".png"), title)
    return text


def write_tune(results: report.Results, jobs: list, out: Path) -> str:
    """Also OUT/settings.json, which `publish` puts into docs/settings.json."""
    settings = [setting_of(results, tuning.BASE, "", 0)]
    for job in jobs[1:]:
        settings.append(setting_of(results, job.variant.name, job.variant.flags, job.seed))
        settings[-1] |= {"group": job.variant.group, "steps": job.variant.steps}
    kept = tuning.merge(out / tuning.FILE.name, settings)
    figures.trajectories(tuning.panels(kept), out / "tune.png", "Settings that were tried", 5)
    return tuning.tables_of(kept)


def setting_of(results: report.Results, name: str, flags: str, seed: int) -> dict:
    def ends(stats, key):
        return [round(float(stats[k]), 5) for k in (key, "low", "high")]

    return {
        "group": name,
        "flags": flags,
        "steps": 0,
        "seed": seed,
        "wins": ends(results.wins(name, "base"), "rate"),
        "preference": ends(results.mean(name, "preference"), "mean"),
        "faithfulness": ends(results.mean(name, "faithfulness"), "mean"),
        "drift": float(f"{results.get(name, -1, 'drift').mean():.4g}"),
    }


def write_inversion(results: report.Results, jobs: list, out: Path) -> str:
    shown = {"base": jobs[0].folder / "images" / "step_000000"}
    for job in jobs[1:]:
        if job.seed == results.seeds[0]:
            shown[job.variant.name] = job.folder / "images" / "step_000060"
    few = [name for name in results.variants if "eta" not in name]
    axes = [("step", "preference"), ("calls", "preference"), *TRADE, ("preference", "grain")]
    panels = report.panels(results, few, axes)
    title = f"Paths of inversion, {seeds_of(results)}"
    figures.trajectories(panels, out / "inversion.png", title, columns=3)
    report.samples({name: shown[name] for name in ["base", *few]}, PROMPTS, out / "samples.png")
    against = [
        [name, *(report.cell(results.wins(name, few[0], step), "rate") for step in (60, -1))]
        for name in results.variants[1:]
    ]
    heads = ["", f"wins over {few[0]}, %, after 60 steps", "at equal compute"]
    parts = {
        "After 60 steps": report.scores_table(results, 60, grain=True),
        "At equal compute": report.scores_table(results, grain=True),
        "Against the paper's path": tables.markdown(heads, against),
    }
    return "\n".join(f"### {heading}\n\n{part}" for heading, part in parts.items())


def write_drift(results: report.Results, jobs: list, out: Path) -> str:
    panels = report.panels(results, results.variants, TRADE)
    figures.trajectories(panels, out / "drift.png", f"The first steps, {seeds_of(results)}")
    return report.matched_table(results, results.variants)


def write_confirm(results: report.Results, jobs: list, out: Path) -> str:
    columns = {"after 60 steps": -1}
    return f"{report.scores_table(results, grain=True)}\n{report.wins_table(results, columns)}"


def write_rates(results: report.Results, jobs: list, out: Path) -> str:
    return write_groups(results, jobs, out / "rates", [])


def write_ablation(results: report.Results, jobs: list, out: Path) -> str:
    return write_groups(results, jobs, out / "ablation", ["recipe"])


HEADINGS = {
    "leaderboard": "The task of the demo",
    "noisy": "Every fourth label is wrong",
    "red": "The judge likes red",
    "precision": "Half precision",
}


def write_leaderboard(results: report.Results, jobs: list, out: Path) -> str:
    """Of the task `clean`, `noisy` or `red`; its pictures have the name of the study."""
    name = {"clean": "leaderboard"}.get(jobs[0].task, jobs[0].task)
    level = report.equal_drift(results)
    shown = {"base": jobs[0].folder / "images" / "step_000000"}
    costs: dict[str, list[dict]] = {}
    for job in jobs[1:]:
        costs.setdefault(job.variant.name, []).append(cost_of(job))
        if job.seed == results.seeds[0]:
            last = job.variant.equal or job.variant.steps
            shown[job.variant.name] = job.folder / "images" / f"step_{last:06d}"
    title = f"The tiny model, {seeds_of(results)}"
    figures.dots(report.rank_panels(results, level), out / f"{name}.png", title)
    panels = []
    for heading, names in grouped(jobs).items():
        axes = [("calls", "preference"), ("drift", "preference"), ("preference", "faithfulness")]
        for panel in report.panels(results, names, axes):
            panels.append(panel | {"title": f"{heading}: {panel['title'].lower()}"})
    figures.trajectories(panels, out / f"{name}_curves.png", title, columns=3)
    report.samples(shown, PROMPTS, out / f"{name}_samples.png")
    settings = {
        job.variant.name: [job.variant.flags, str(job.variant.equal or job.variant.steps)]
        for job in jobs[1:]
    }
    return f"## {HEADINGS[name]}\n\n" + "\n".join(
        (
            report.rank_table(results, level),
            f"![preference by UNet calls and by drift, and faithfulness]({name}_curves.png)\n",
            f"![one image of each model for six prompts]({name}_samples.png)\n",
            "At equal compute:\n",
            report.scores_table(results, settings=settings),
            "What whole runs cost, to 60 steps or equal compute, whichever comes later:\n",
            report.cost_table(costs),
        )
    )


def grouped(jobs: list) -> dict[str, list[str]]:
    """{group: names of its variants}, InPO before each."""
    found: dict[str, dict[str, None]] = {}
    for job in jobs[1:]:
        found.setdefault(job.variant.group, {"InPO": None})[job.variant.name] = None
    return {group: list(names) for group, names in found.items()}


def cost_of(job) -> dict:
    fix = "delete that folder; the same command trains again"
    if (cost := tables.read_cost(job.folder, fix)) is None:
        raise UserError(f"{job.folder} has no cost.json; {fix}.")
    return cost


def write_precision(results: report.Results, jobs: list, out: Path) -> str:
    first = results.variants[0]
    heads = ["model", f"wins over {first}, %", f"gain in preference over {first}"]
    rows = [
        [v, report.cell(results.wins(v, first), "rate"),
         report.cell(results.gain(v, first), "mean", 1, "+.3f")]
        for v in results.variants[1:]
    ]  # fmt: skip
    table = report.scores_table(results)
    return f"## {HEADINGS['precision']}\n\n{table}\n{tables.markdown(heads, rows)}"


WRITERS = {
    "tune": write_tune,
    "ablation": write_ablation,
    "leaderboard": write_leaderboard,
    "noisy": write_leaderboard,
    "red": write_leaderboard,
    "precision": write_precision,
    "inversion": write_inversion,
    "drift": write_drift,
    "confirm": write_confirm,
    "rates": write_rates,
    "verdict": write_confirm,
}


def publish(study: str, text: str, out: Path, page: Path):
    """Put what was written into a committed page, section by section, its pictures beside it.

    Of `tune` also the settings, those of the groups that were tried, and all tables anew."""
    if study == "tune":
        kept = tuning.merge(page.with_name(tuning.FILE.name), tuning.read(out / tuning.FILE.name))
        figures.trajectories(tuning.panels(kept), page.with_suffix(".png"), "Settings tried", 5)
        text = tuning.tables_of(kept)
    else:
        for file in [*out.glob(f"{study}*.png"), out / f"{study}.json"]:
            shutil.copyfile(file, page.with_name(file.name))
    for section in re.split("^## ", text, flags=re.MULTILINE)[1:]:  # "###" stays inside
        heading, _, body = section.partition("\n")
        write_section(page, heading, body)
