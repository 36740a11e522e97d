"""upload.py against a server that answers as the hub does: what is sent, what is not, the card."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from conftest import distance, weights
from hub_server import Hub, flaws
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file

import train_inpo
from system import hub
from system.files import ROOT
from training import card, export, flags, plan, preview
from training.upload import use_plain_uploads

LORA = hub.LORA


@pytest.fixture(scope="module")
def runs(command, checkpoint, pairs, tmp_path_factory):
    """Two finished runs of two steps, "full" and "lora", from folders that nobody is to hear of."""
    root = tmp_path_factory.mktemp("secret-home")
    shutil.copytree(checkpoint(), root / "mybase")
    shutil.copy(pairs, root / "mypairs.parquet")
    (root / "mine.txt").write_text("a red circle\na blue circle\n")
    (root / "mine.py").write_text("def rank(images, prompts):\n    return [1.0] * len(images)\n")
    how = {"model": root / "mybase", "data": root / "mypairs.parquet", "checkpoint_every": 1}
    how |= {"sample_every": 1, "export_every": 1, "sample_prompts": root / "mine.txt"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "STEPS", 2)
        judge = f"{root / 'mine.py'}:rank"
        for flags in ({"judge": judge}, {"lora_rank": 2, "lr": 1e-1}):
            name = "full" if "judge" in flags else "lora"
            argv = command(root / name, **how, **flags)
            patch.setattr(sys, "argv", [str(ROOT / "train_inpo.py"), *argv])
            train_inpo.main(argv)
    return root


@pytest.fixture
def server(monkeypatch, tmp_path):
    hub.reachable.cache_clear()
    server = Hub("hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)  # as users have it
    yield server
    server.shutdown()
    server.server_close()
    hub.reachable.cache_clear()


def upload(*argv) -> None:
    export.main([str(word) for word in argv])


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        upload(*argv)
    assert stop.value.code == 2
    *bars, said = capsys.readouterr().err.splitlines()  # of huggingface_hub, of what is sent
    assert "Traceback" not in "".join(bars)
    assert said.startswith("training.export: error: ")
    return said


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def put(files: dict[str, bytes], folder: Path) -> Path:
    """What the server has, as a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


SAMPLES = {f"samples/step_00000{step}.png" for step in (0, 1, 2)}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


# -------------------------------------------------------------------------------------------------
# What is sent.


def test_a_finished_run_is_sent_as_it_is_and_nothing_else(runs, server, tmp_path, capsys):
    out = runs / "full"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    upload(out, "--upload", "me/full", "--private")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    ((name, repository),) = server.repositories.items()
    files = repository["files"]
    assert name == "me/full" and repository["private"]
    pictures = SAMPLES | {f"samples/model_000002_0{i}.png" for i in (0, 1)}
    model = {str(f.relative_to(out)) for part in PARTS for f in (out / part).rglob("*.*")}
    assert set(files) == {"README.md", "curves.png", "model_index.json"} | pictures | model
    edited = {"README.md", "model_index.json", "unet/config.json", "vae/config.json"}
    for file in set(files) - edited:
        assert files[file] == (out / file).read_bytes(), file
    for file in edited - {"README.md"}:
        there = json.loads((out / file).read_bytes())
        assert there.pop("_name_or_path") and json.loads(files[file]) == there
    said = capsys.readouterr().out.splitlines()
    size = sum(map(len, files.values()))
    first = f"Uploading {len(files)} files, {size / 1e6:.1f} MB to {server.url}/me/full (private):"
    assert said[-len(files) - 2] == first and said[-1] == f"It is at {server.url}/me/full."
    listed = dict(line.split()[::-1] for line in said[-len(files) - 1 : -1])
    assert {k: int(v.replace(",", "")) for k, v in listed.items()} == {
        name: len(content) for name, content in files.items()
    }
    there = put(files, tmp_path / "there")
    assert distance(weights(there), weights(out)) == 0
    diffusers.StableDiffusionXLPipeline.from_pretrained(there)


def test_nothing_that_is_sent_names_a_folder_of_this_machine(runs, server):
    for name in ("full", "lora"):
        upload(runs / name, "--upload", f"me/{name}")
        files = server.repositories[f"me/{name}"]["files"]
        for file, content in files.items():
            assert b"secret-home" not in content and str(ROOT).encode() not in content, file
        text = files["README.md"].decode()
        assert "--model=.../mybase --data=.../mypairs.parquet --out=.../" in text
        assert "| sample-prompts | .../mine.txt |" in text and "| beta | 500.0 |" in text
    sent = str(server.commits)
    assert "secret-home" not in sent and "step 2" in server.commits[0][0]["value"]["summary"]


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_hub_accepts_the_card_and_its_gallery_shows_the_model_by_prompt(name, runs, server):
    upload(runs / name, "--upload", "me/some")
    files = server.repositories["me/some"]["files"]
    text = files["README.md"].decode()
    assert ("POST", "/api/validate-yaml") in server.requests and not flaws(text)
    told = ModelCard(text).data.to_dict()
    assert told["library_name"] == "diffusers" and told["pipeline_tag"] == "text-to-image"
    assert not told.keys() & {"base_model", "base_model_relation", "datasets", "license"}
    assert ("lora" in told["tags"]) == (name == "lora")
    urls = [entry["output"]["url"] for entry in told["widget"]]
    assert urls == [f"samples/model_000002_0{i}.png" for i in (0, 1)]
    assert [entry["text"] for entry in told["widget"]] == ["a red circle", "a blue circle"]
    assert "<Gallery />" in text and "(samples/step_000002.png)" in text
    links = re.findall(r"\]\(([^)]+\.png)\)", text)
    assert set(links) <= set(files) and len(links) == 2
    load = 'load_lora_weights("me/some")' if name == "lora" else 'from_pretrained("me/some")'
    assert load in re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def test_pictures_of_the_gallery_are_those_of_the_grid(runs):
    grid = Image.open(runs / "full" / "samples" / "step_000002.png")
    for name in ("start_00", "start_01", "model_000002_00", "model_000002_01"):
        one = Image.open(runs / "full" / "samples" / f"{name}.png").resize((128, 128), 0)
        found = any(
            grid.crop((x, y, x + 128, y + 128)).tobytes() == one.tobytes()
            for x in range(grid.width - 127)
            for y in range(grid.height - 127)
            if grid.getpixel((x, y)) == one.getpixel((0, 0))
        )
        assert found, name


def test_a_lora_run_sends_its_adapters_alone_in_both_forms(runs, server):
    upload(runs / "lora", "--upload", "me/lora")
    repository = server.repositories["me/lora"]
    files = repository["files"]
    assert not repository["private"] and not {f.split("/")[0] for f in files} & set(PARTS)
    for name in (LORA, hub.KOHYA_LORA):
        assert files[name] == (runs / "lora" / name).read_bytes()


def test_a_checkpoint_is_exported_and_sent_with_what_was_drawn_up_to_its_step(
    runs, server, tmp_path
):
    out = tmp_path / "half"
    path = runs / "full" / "checkpoints" / "step_000001"
    argv = [path, "--upload", "me/half", "--to", "unet", "--dtype", "fp16", "--out", out]
    upload(*argv)
    files = server.repositories["me/half"]["files"]
    pictures = {f"samples/model_000001_0{i}.png" for i in (0, 1)} | SAMPLES
    pictures.remove("samples/step_000002.png")
    unet = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert set(files) == {"README.md", "curves.png"} | pictures | unet
    there = put(files, tmp_path / "there")
    sent = load_file(there / "diffusion_pytorch_model.safetensors")
    trained = load_file(runs / "full/unets/step_000001/diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in sent.values()} == {torch.float16}
    assert all(torch.equal(sent[k], trained[k].half()) for k in trained)
    text = files["README.md"].decode()
    assert "of 1 steps" in text and "the model of step 1" in text and "unet=unet)" in text
    assert Image.open(there / "curves.png").size[0] > 500


def test_an_export_whose_start_has_changed_says_so_without_a_path(runs, server, tmp_path):
    argv = [runs / "lora" / "checkpoints" / "step_000001", "--out", tmp_path / "out"]
    upload(*argv)
    with open(tmp_path / "out" / "README.md", "a") as file:  # as `export` writes it
        file.write("\nWarning: /home/me/base, what was put into it, or a library has changed.\n")
    upload(*argv, "--upload", "me/x")
    text = server.repositories["me/x"]["files"]["README.md"].decode()
    assert "Warning: what was trained from" in text and "/home/me" not in text


def test_a_run_that_has_not_finished_and_a_damaged_one_send_their_newest_checkpoint(
    runs, server, tmp_path
):
    unfinished, damaged = tmp_path / "unfinished", tmp_path / "damaged"
    for copy in (unfinished, damaged):
        shutil.copytree(runs / "lora", copy)
    (unfinished / "README.md").unlink()
    with open(damaged / LORA, "ab") as file:
        file.write(b"0")
    for path in (unfinished, damaged):
        upload(path, "--upload", f"me/{path.name}")
        sent = put(server.repositories[f"me/{path.name}"]["files"], tmp_path / f"{path.name}-there")
        expected = load_file(runs / "lora" / LORA)
        assert distance(load_file(sent / LORA), expected) == 0


@pytest.mark.parametrize(
    "name, file", [("full", "diffusion_pytorch_model.safetensors"), ("lora", LORA)]
)
def test_the_best_model_and_those_on_the_way_are_sent_as_they_lie(
    name, file, runs, server, tmp_path
):
    run = shutil.copytree(
        runs / name, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")
    )
    shutil.copytree(run / "unets" / "step_000001", run / "best")
    (run / "best.json").write_text(json.dumps({"step": 1, "scorer": "clip", "mean": 0.3}))
    for path in (run / "best", run / "unets" / "step_000001"):
        upload(path, "--upload", f"me/{path.name}")
        files = server.repositories[f"me/{path.name}"]["files"]
        assert files[file] == (path / file).read_bytes()
        assert "samples/step_000001.png" in files and "samples/step_000002.png" not in files
        assert ("lora" in front(files["README.md"].decode())["tags"]) == (name == "lora")


def test_the_same_upload_again_sends_what_is_missing_and_makes_no_empty_commit(
    runs, server, capsys
):
    argv = runs / "lora", "--upload", "me/again"
    server.broken = "/commit/"
    said = refused(capsys, *argv)
    assert "was not uploaded; the same command sends what is missing: " in said
    sent = [path for method, path in server.requests if method == "PUT"]
    assert sent and not server.commits
    server.broken = ""
    upload(*argv)
    assert [path for method, path in server.requests if method == "PUT"] == sent
    upload(*argv)
    assert len(server.commits) == 1


@pytest.mark.parametrize("xet", [False, True])
def test_git_lfs_takes_the_place_of_xet_where_a_server_has_none(xet, server):
    server.repositories["me/x"], server.xet = {"files": {}}, xet
    use_plain_uploads("me/x")
    assert constants.HF_HUB_DISABLE_XET is not xet


# -------------------------------------------------------------------------------------------------
# The card.


def facts(**given) -> dict:
    """Of a run on a hub id, in a card.json of before, without "local"."""
    plain = {"title": "m-inpo", "method": "inpo", "adapters": False, "pairs": 4, "versions": "v"}
    plain |= {"base_model": hub.PRESETS["sdxl"], "data": "owner/pairs", "command": "deepspeed x.py"}
    return dict.fromkeys(("unet", "unet_subfolder", "merged")) | {"local": []} | plain | {
        "recipe": {}
    } | given  # fmt: skip


def test_only_what_is_on_the_hub_is_named_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "sft").mkdir(parents=True)
    told = front(card.render(facts(), []))
    sdxl = hub.PRESETS["sdxl"]
    assert told["base_model"] == sdxl and told["base_model_relation"] == "finetune"
    assert told["datasets"] == ["owner/pairs"] and told["license"] == "openrail++"
    sd15 = front(card.render(facts(base_model=hub.PRESETS["sd15"], adapters=True), []))
    assert (sd15["license"], sd15["base_model_relation"]) == ("creativeml-openrail-m", "adapter")
    for given, base, license in [
        ({"unet": "owner/dpo"}, [sdxl, "owner/dpo"], None),
        ({"unet": "my/sft"}, sdxl, None),  # a folder here, though it looks like a hub id
        ({"merged": "there/lora", "local": ["there/lora"]}, sdxl, None),  # it was one then
        ({"base_model": "/home/me/base"}, None, None),
        ({"base_model": "assets/tiny-sdxl", "data": "toy"}, None, None),
        ({"base_model": "owner/other", "data": "my/sft"}, "owner/other", None),
    ]:
        text = card.render(facts(**given), [])
        told = front(text)
        assert (told.get("base_model"), told.get("license")) == (base, license) and not flaws(text)
        assert ("base_model_relation" in told) == (base is not None)
        assert ("datasets" in told) == ("data" not in given)


def test_a_relative_folder_is_known_as_one_wherever_it_is_sent_from(argv, tmp_path, monkeypatch):
    (tmp_path / "my" / "pairs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    args = flags.parse("", argv(data="my/pairs", vae="owner/vae"))
    monkeypatch.setattr(sys, "argv", ["train_inpo.py", "--data", "my/pairs"])
    record = card.facts(args, plan.asked(args), False, 4, 1)
    monkeypatch.chdir("/")
    text = card.render(card.public(json.loads(json.dumps(record))), [])
    assert "my/pairs" not in text and "--data .../pairs" in text and "| vae | owner/vae |" in text


def test_of_a_path_the_public_card_has_the_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "sft").mkdir(parents=True)
    record = facts(
        command="deepspeed /opt/x/train_inpo.py '--data=/data/a b.parquet' --unet my/sft --judge "
        "~/m.py:f --lr 1e-5 --vae owner/vae --lora there/x --beta 5",
        data="/data/a b.parquet", unet="my/sft", merged="there/x",
        recipe={"vae": "owner/vae", "lora": "there/x", "judge": "~/m.py:f", "lr": 1e-5},
        local=["there/x"],
    )  # fmt: skip
    told = card.public(record)
    assert told["command"] == (
        "deepspeed train_inpo.py '--data=.../a b.parquet' --unet .../sft --judge .../m.py:f "
        "--lr 1e-5 --vae owner/vae --lora .../x --beta 5"
    )
    assert (told["data"], told["unet"], told["merged"]) == (".../a b.parquet", ".../sft", ".../x")
    assert told["recipe"] == record["recipe"] | {"lora": ".../x", "judge": ".../m.py:f"}
    assert told["base_model"] == record["base_model"]


# -------------------------------------------------------------------------------------------------
# Mistakes.


def test_each_mistake_is_one_sentence_before_anything_is_loaded_or_made(
    runs, server, tmp_path, monkeypatch, capsys
):
    def loaded(*given):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(export, "load", loaded)
    step = runs / "full" / "checkpoints" / "step_000001"
    for name in ("full", "a/b/c", "me/", "/full", "me/a--b", "me/-x", "me/x.git", "me/a b"):
        assert "name one as OWNER/NAME" in refused(capsys, step, f"--upload={name}")
    said = refused(capsys, step, "--private")
    assert "--private: has no meaning without --upload OWNER/NAME" in said
    assert "neither a run's folder" in refused(capsys, tmp_path, "--upload", "me/x")
    no_card = shutil.copytree(runs / "lora", tmp_path / "lora")
    (no_card / "card.json").unlink()
    assert "card.json cannot be read" in refused(capsys, no_card, "--upload", "me/x")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    said = refused(capsys, step, "--upload", "me/x")
    assert said.endswith(
        "there is no login; `hf auth login`, or set HF_TOKEN to a token that may write."
    )
    assert not server.requests

    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert "the token is not valid" in refused(capsys, step, "--upload", "me/x")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "this login may not write there" in refused(capsys, step, "--upload", "they/x")
    server.repositories["me/public"] = {"name": "me/public", "private": False, "files": {}}
    said = refused(capsys, step, "--upload", "me/public", "--private")
    assert "is there and public" in said
    assert not server.commits and set(server.repositories) == {"me/public"}
    assert not (runs / "full" / "exports" / "step_000001-pipeline-fp32").exists()


def test_without_network_there_is_one_sentence(runs, server, monkeypatch, capsys):
    server.shutdown()
    server.server_close()
    said = refused(capsys, runs / "full", "--upload", "me/full")
    assert f"{server.url}: the hub cannot be reached; check the network." in said


def test_a_card_that_the_hub_refuses_sends_no_file(runs, server, monkeypatch, capsys):
    monkeypatch.setattr(card, "is_local", lambda *given: False)
    said = refused(capsys, runs / "lora", "--upload", "me/full")
    assert "Invalid metadata in README.md" in said
    assert not server.blobs and not server.commits


@pytest.mark.slow
def test_hf_endpoint_names_the_server(runs, server):
    argv = [sys.executable, "-m", "training.export", runs / "lora", "--upload", "me/lora"]
    env = {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    said = subprocess.run(argv, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert (
        said.returncode == 0 and said.stdout.splitlines()[-1] == f"It is at {server.url}/me/lora."
    )
    assert LORA in server.repositories["me/lora"]["files"]
