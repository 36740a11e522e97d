"""Put the model of a run on the Hugging Face hub, or on any server that speaks its protocol
(HF_ENDPOINT): python -m training.export RUN --upload OWNER/NAME.

    the model       of a finished run what result.json lists, else the export of a checkpoint; of
                    RUN/best and RUN/unets/step_* what lies there
    README.md       the card, see card.py, without folders of this machine, with a gallery
    curves.png      up to the model's step
    samples/        step_*.png up to the model's step, and the newest step's pictures one by one

Nothing else goes: no checkpoints, logs, events or settings. `_name_or_path`, which diffusers notes
in its configurations, can be a folder of this machine; it is taken out of what is sent. Files of
the same name are replaced, README.md too, and nothing is deleted. huggingface_hub does the work: it
has the card checked before it sends a byte, and a repeated upload sends what is missing.
"""

import json
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers

from evaluation import figures
from system import checkpoint, hub
from system.files import UserError, read_json
from system.text import code, printable
from training import card
from training.budget import in_words
from training.folder import read_metrics, read_record, read_result
from training.methods import loss_of

# -------------------------------------------------------------------------------------------------
# What is there.


class Model(NamedTuple):
    run: Path
    folder: Path  # where the model lies: the run's, an export's, best/ or unets/step_*
    files: list[str]  # in that folder
    step: int
    kind: str  # "pipeline", "unet", "lora", or another form of an export


def facts(run: Path) -> dict:
    """What the card says of a run. Raises UserError."""
    return card.read(run / "card.json", "an upload needs what it says of the run")


def lying_in(path: Path) -> Model | None:
    """The model that a folder holds as it is; None where a checkpoint has to be exported first.
    Raises UserError where a finished run is damaged and has no checkpoint."""
    path = path.resolve()
    if (path / "README.md").exists() and (path / "run.json").exists():
        try:
            found = read_result(path)
        except UserError:
            if checkpoint.complete(path / "checkpoints"):
                return None
            raise
        files = [name for name in found["files"] if name not in ("cost.json", "curves.png")]
        return Model(path, path, files, found["step"], kind_of(files))
    for run, step in ((path.parent, step_of_best), (path.parent.parent, step_of_name)):
        if (run / "run.json").exists() and path.parent.name != "checkpoints":
            files = [str(f.relative_to(path)) for f in sorted(path.rglob("*")) if f.is_file()]
            if files and (at := step(path)) is not None:
                return Model(run, path, files, at, kind_of(files))
    return None


def step_of_best(path: Path) -> int | None:
    return read_json(path.parent / "best.json").get("step") if path.name == "best" else None


def step_of_name(path: Path) -> int | None:
    found = re.fullmatch(r"step_(\d+)", path.name)
    return int(found[1]) if found and path.parent.name == "unets" else None


def kind_of(files: list[str]) -> str:
    kinds = {"model_index.json": "pipeline", hub.LORA: "lora"}
    return next((kind for name, kind in kinds.items() if name in files), "unet")


def exported(out: Path, path: Path) -> Model:
    """The model in an export of a checkpoint."""
    found = read_result(out)
    return Model(path.parent.parent, out, list(found["files"]), found["step"], found["of"][1])


# -------------------------------------------------------------------------------------------------
# What is sent.


def contents(model: Model, repository: str) -> dict[str, Path | bytes]:
    """{place in the repository: file, or bytes where they differ from the file's}."""
    files: dict[str, Path | bytes] = {
        name: without_path(model.folder / name) for name in model.files
    }
    samples, found = model.run / "samples", {}
    for file in samples.glob("step_*.png"):
        if (step := re.fullmatch(r"step_(\d+)", file.stem)) and int(step[1]) <= model.step:
            found[int(step[1])] = file
    newest = max(found, default=0)
    pictures = sorted(samples.glob(f"model_{newest:06d}_*.png"))
    files |= {f"samples/{file.name}": file for file in [*found.values(), *pictures]}
    files["curves.png"] = curves(model)
    files["README.md"] = written(model, repository, newest, [*files]).encode()
    return dict(sorted(files.items()))


def curves(model: Model) -> Path | bytes:
    """Of a finished run's own model its picture, else one of the steps up to the model's."""
    if model.folder == model.run and (there := model.run / "curves.png").is_file():
        return there
    told, lines = facts(model.run), read_metrics(model.run, model.step)
    with tempfile.TemporaryDirectory() as scratch:
        figures.curves(lines, file := Path(scratch, "curves.png"), told["title"], loss_of(told))
        return file.read_bytes()


def without_path(file: Path) -> Path | bytes:
    """A JSON file without `_name_or_path`; any other file itself."""
    if file.suffix == ".json" and b'"_name_or_path"' in (content := file.read_bytes()):
        kept = {k: v for k, v in json.loads(content).items() if k != "_name_or_path"}
        return (json.dumps(kept, indent=2) + "\n").encode()
    return file


def written(model: Model, repository: str, newest: int, files: list[str]) -> str:
    """The card, with those of the files that are pictures; newest: the step of the last ones."""
    record = facts(model.run) | {"adapters": model.kind == "lora"}
    record = card.public(record) | {"place": repository}
    prompts = read_record(model.run).get("prompts") or []
    widget = [
        {"text": printable(prompt), "output": {"url": file}}
        for k, prompt in enumerate(prompts)
        if (file := f"samples/model_{newest:06d}_{k:02d}.png") in files
    ]
    kinds = ("pipeline", "unet")  # adapters have their lines without this, other forms none
    python = card.loading_all(record, model.kind) if model.kind in kinds else ""
    shown = [code(python, "python")] if python else []
    shown += ["<Gallery />"] if widget else []
    if (grid := f"samples/step_{newest:06d}.png") in files:
        about = (
            f"The start beside the model of step {newest}: same prompts, same seeds, not picked."
        )
        shown += [f"{about}\n\n![the start beside step {newest}]({grid})"]
    shown += ["![training curves](curves.png)"]
    if is_warned(model.folder):
        shown += [
            "Warning: what was trained from, or a library, had changed between the run and this "
            "export, so this may not be the model that was trained."
        ]
    lines = read_metrics(model.run, model.step)
    return card.render(record, lines, widget, "\n\n".join(shown))


def is_warned(folder: Path) -> bool:
    """Whether an export says on its card that its base is another one than the run's."""
    file = folder / "README.md"
    return file.is_file() and "\nWarning: " in file.read_text("utf-8", "replace")


# -------------------------------------------------------------------------------------------------
# Where it goes.


def ask(repository: str, what: str, action: Callable[[], Any]) -> Any:
    """action(), of huggingface_hub; what goes wrong becomes one sentence."""
    try:
        return action()
    except Exception as error:  # of the library, of HTTP below it, of a file that is gone
        status = getattr(getattr(error, "response", None), "status_code", None)
        status = status if isinstance(error, HfHubHTTPError) else None
        said = {
            401: "the token is not valid; `hf auth login`, or mend HF_TOKEN",
            403: "this login may not write there; take an OWNER of yours, a token that may write",
        }.get(status, hub.reason(error))
        raise UserError(f"--upload {repository}: {what}: {said}.") from error


def prepare(repository: str, private: bool) -> bool:
    """Create the repository where there is none, before anything is loaded; whether it is private.

    Raises UserError without a login or network, where the login may not write there, and where it
    is public and should be private."""
    if get_token() is None:
        raise UserError(
            f"--upload {repository}: there is no login; `hf auth login`, or set HF_TOKEN to a "
            "token that may write."
        )
    if not hub.reachable():
        raise UserError(f"--upload {repository}: {constants.ENDPOINT}: {hub.UNREACHABLE}.")
    api, hidden = HfApi(), private or None  # None: as its owner has set it
    create = partial(api.create_repo, repository, private=hidden, exist_ok=True)
    ask(repository, "was not made", create)
    is_private = ask(repository, "cannot be read", partial(api.model_info, repository)).private
    if private and not is_private:
        raise UserError(
            f"--upload {repository}: is there and public; make it private on its page, or name "
            "another one."
        )
    return bool(is_private)


def send(model: Model, repository: str, private: bool) -> str:
    """Say what is sent, and send it in one commit; the page's address."""
    files = contents(model, repository)
    sizes = {k: len(f) if isinstance(f, bytes) else f.stat().st_size for k, f in files.items()}
    whole = f"{len(files)} files, {in_words(sum(sizes.values()))}"
    address = f"{constants.ENDPOINT}/{repository}"
    print(f"Uploading {whole} to {address} ({'private' if private else 'public'}):")
    for name, size in sizes.items():
        print(f"  {size:>15,}  {printable(name)}")
    use_plain_uploads(repository)
    operations = [CommitOperationAdd(*item) for item in files.items()]
    message = f"{printable(facts(model.run)['title'])}, step {model.step}"
    commit = partial(HfApi().create_commit, repository, operations, commit_message=message)
    ask(repository, "was not uploaded; the same command sends what is missing", commit)
    return address


def use_plain_uploads(repository: str):
    """Where a server has no Xet storage, upload by Git LFS: huggingface_hub takes the first where
    hf_xet is installed, without asking."""
    place = f"{constants.ENDPOINT}/api/models/{repository}/xet-write-token/main"
    if not constants.HF_HUB_DISABLE_XET:
        get = partial(get_session().get, place, headers=build_hf_headers())
        constants.HF_HUB_DISABLE_XET = ask(repository, "cannot be asked", get).status_code == 404
