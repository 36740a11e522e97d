"""The files of a judgement under --out: written, set aside, read again.

A judgement of other models or settings is kept under its date. One of the same pictures and scores,
with other votes of people, takes the place of what was there.
"""

from pathlib import Path

from evaluation import gallery, page, tables
from evaluation.people import SCORER
from evaluation.votes import Vote
from system.files import UserError, encoded, is_number, read_json, set_aside, warn_once, write


def save(out: Path, kept: dict, results: dict, folders: dict, votes: list[Vote]):
    """Write and print what evaluate.py lists. kept: of scores.json; results: of results.json;
    folders: {set: {model: its folder of pictures}}. The page comes last: where it fails, as on a
    full disk, that is a warning."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {"scores.json": gallery.to_json(kept), "results.json": gallery.to_json(results)}
    texts["table.md"] = tables.table(results)
    there = [out / name for name in texts if (out / name).is_file()]
    if any(path.read_bytes() != encoded(texts[path.name]) for path in there):
        if not same_but_for_votes(out, kept, results):
            pictures = [f"{key}.png" for key in kept]
            there += [path for name in [*pictures, "index.html"] if (path := out / name).is_file()]
            moved = ", ".join(path.name for path in set_aside(there))
            print(f"The earlier results, of other models or settings, are kept as {moved}.\n")
    for name, text in texts.items():
        write(out / name, text)
    print(texts["table.md"])
    for key, row in folders.items():
        of, shown = kept[key], {}
        for name, folder in row.items():
            pairs = zip(of["images"], of["files"][name], strict=True)
            shown[name] = folder, [entry | {"file": file} for entry, file in pairs]
        picture = gallery.overview(shown, results["sets"][key]["prompts"])
        gallery.save_png(picture, out / f"{key}.png")
    try:
        page.write_all(out, results, kept, folders, votes)
    except OSError as error:
        warn_once(f"{out / 'index.html'} or the folder blind was not written ({error}).")


def without_people(results: dict) -> dict:
    rates = [record for record in results["win_rates"] if record["scorer"] != SCORER]
    return {key: results[key] for key in results if key != "people"} | {"win_rates": rates}


def same_but_for_votes(out: Path, kept: dict, results: dict) -> bool:
    """Whether --out holds a judgement of these pictures and scores."""
    try:
        there = without_people(read_json(out / "results.json"))
        return read_json(out / "scores.json") == kept and there == without_people(results)
    except (UserError, KeyError, TypeError):  # damaged, or none
        return False


def scores(out: Path, found: dict, judges: list[str], functions: dict) -> dict:
    """{scorer: {set: {model: numbers}}} of scores.json under --out, of the judges whose numbers are
    all there; {} where they are of other models or pictures.

    found: {set: {model: (folder, manifest, ...)}}; functions: digests of one's own scorers' files.
    """
    try:
        results, there = read_json(out / "results.json"), read_json(out / "scores.json")
        since = (out / "scores.json").stat().st_mtime
        for key, row in found.items():
            for name, (folder, manifest, *_) in row.items():
                images = manifest["images"]
                same = there[key]["files"][name] == [e["file"] for e in images]
                same &= texts_of(there[key]["images"]) == texts_of(images)
                same &= results["models"][name]["identity"] == manifest.get("identity")
                if not same or any((folder / e["file"]).stat().st_mtime > since for e in images):
                    return {}

        def numbers(judge: str, key: str, name: str) -> list[float]:
            values = there[key]["scores"][name][judge]
            if len(values) != len(there[key]["images"]) or not all(map(is_number, values)):
                raise ValueError(f"{out} is damaged")
            return values

        known = results.get("functions", {})
        judges = [j for j in judges if j in scorers_of(there) and known.get(j) == functions.get(j)]
        return {
            judge: {k: {name: numbers(judge, k, name) for name in row} for k, row in found.items()}
            for judge in judges
        }
    except (UserError, OSError, LookupError, TypeError, ValueError, AttributeError):
        return {}


def texts_of(images: list[dict]) -> list[str]:
    return [entry["prompt"] for entry in images]


def scorers_of(there: dict) -> set[str]:
    """The scorers of scores.json."""
    return {scorer for row in there.values() for of in row["scores"].values() for scorer in of}
