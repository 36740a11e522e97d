"""Blind judging: a folder in which nothing that is shown tells of a model.

    blind/index.html           shows two pictures of a prompt at a time, and keeps votes
    blind/3fa0...d1.png ...    all pictures under names that say nothing: hard links, or copies
                               where the file system has none

All that index.html holds of models is its key, who drew which picture, in base64, which is decoded
where votes are saved and nowhere else. Pairs come in a shuffled order, as do the two of a pair; the
sides are drawn in the browser. All names end in .png, whatever the files are, since a format may be
that of one model. Names and order are a function of what is judged, so that the same command writes
the same bytes: they hide models from people, not from who computes.
"""

import base64
import hashlib
import json
import os
import random
import re
import shutil
from itertools import combinations
from pathlib import Path

from system.files import replacing, write

NAME = re.compile(r"[0-9a-f]{24}\.png")


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def content(sets: dict[str, dict], identities: dict) -> tuple[dict, dict[str, tuple]]:
    """(what index.html holds, {name of a picture: (set, model, image)}).

    sets: {set: {"images": [{prompt, seed}], "files": {model: [file, ...]}}}, as scores.json has it;
    identities: {model: identity of its weights or None}."""
    mark = digest(sets_key(sets), list(identities.items()))
    dice = random.Random(mark)
    names, texts, pairs = {}, {}, []
    for key, row in sets.items():
        for k, entry in enumerate(row["images"]):
            hidden = {model: f"{digest(mark, key, model, k)}.png" for model in row["files"]}
            names |= {name: (key, model, k) for model, name in hidden.items()}
            text = texts.setdefault(entry["prompt"], len(texts))
            for pair in combinations(row["files"], 2):
                pair = dice.sample(pair, 2)
                who = [key, k, entry.get("seed"), *pair]
                pairs.append(([text, *(hidden[model] for model in pair)], who))
    dice.shuffle(pairs)
    secret = json.dumps({"models": identities, "pairs": [who for _, who in pairs]})
    shown = {"id": mark, "prompts": list(texts), "pairs": [seen for seen, _ in pairs]}
    return shown | {"key": base64.b64encode(secret.encode()).decode()}, names


def sets_key(sets: dict[str, dict]) -> list:
    return [
        [key, [[e["prompt"], e.get("seed")] for e in row["images"]], row["files"]]
        for key, row in sets.items()
    ]


def put(picture: Path, place: Path):
    """Let `place` be the file `picture`: a hard link, or a copy where that cannot be."""
    if place.exists():
        there, wanted = place.stat(), picture.stat()
        if os.path.samestat(there, wanted):
            return
        if (there.st_size, there.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns):
            return  # a copy of before
        place.unlink()
    try:
        os.link(picture.resolve(), place)
    except OSError:  # another disk, a file of somebody else's, no such thing as links
        with replacing(place) as scratch:
            shutil.copy2(picture, scratch)


def write_folder(out: Path, sets: dict, identities: dict, folders: dict, fill) -> None:
    """Write the folder. folders: {set: {model: its folder of pictures}}; fill(content) -> HTML.

    Pictures of an earlier judgement are taken away at the end."""
    shown, names = content(sets, identities)
    out.mkdir(parents=True, exist_ok=True)
    for name, (key, model, k) in sorted(names.items()):  # in an order that is no model's
        put(folders[key][model] / sets[key]["files"][model][k], out / name)
    write(out / "index.html", fill(shown))
    for path in list(out.iterdir()):
        if NAME.fullmatch(path.name) and path.name not in names:
            path.unlink()
