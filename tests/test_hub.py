"""Laws of hub.py: models and pairs by name, in a folder, in the cache, or on a hub that hangs."""

import json
import shutil
import time
from types import SimpleNamespace

import pytest
from conftest import refusal
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import save_file

from system import checkpoint as checkpoints
from system import hub

both = pytest.mark.parametrize("kind", ["sdxl", "sd15"])
FILES = ["model_index.json", "unet/config.json", "config.json", hub.LORA]


def raising(cls):
    """An error of the hub, without the response that its class asks for."""
    return cls.__new__(cls, "404")


# -------------------------------------------------------------------------------------------------
# What a folder or a repository is.


@both
def test_architecture_and_configurations_are_read_from_the_folder(checkpoint, kind):
    folder = checkpoint(kind)
    assert hub.architecture(str(folder)) == kind
    for part in ("unet", "vae", "scheduler"):
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        written = json.loads((folder / part / file).read_text())
        assert hub.read_config(str(folder), part) == written
    assert hub.read_config(str(folder / "unet"), "unet")["sample_size"] == 8
    assert hub.read_config(str(folder / "vae"), "vae")["block_out_channels"] == [8, 16]


@both
def test_the_kind_of_a_model_is_decided_by_the_files_it_has(checkpoint, tmp_path, on_hub, kind):
    unet = checkpoint(kind) / "unet"
    shutil.copytree(unet, tmp_path / "within" / "unet")  # as the published SDXL and SD1.5 UNets
    shutil.copytree(unet, tmp_path / "root")
    shutil.copytree(unet, tmp_path / "both" / "unet")
    (tmp_path / "adapter").mkdir()
    whole = shutil.copytree(checkpoint(kind), tmp_path / "whole")
    for folder in (whole, tmp_path / "both", tmp_path / "adapter"):
        save_file({}, folder / hub.LORA)
    kinds = {"whole": "pipeline", "within": "unet", "root": "unet", "both": "unet"}
    for name, expected in {**kinds, "adapter": "lora"}.items():
        assert hub.kind(str(tmp_path / name)) == hub.kind(on_hub(tmp_path / name)) == expected
    file = str(tmp_path / "adapter" / hub.LORA)
    assert hub.kind(file) == "lora" and hub.kind("tiny") == "pipeline"
    assert hub.lora_file(file) == hub.lora_file(str(tmp_path / "adapter")) == file
    assert hub.lora_file("owner/adapter").endswith(hub.LORA)


@pytest.mark.parametrize("path", ["nowhere", "nowhere.safetensors", "out/nowhere.safetensors"])
def test_a_name_that_cannot_be_on_the_hub_is_not_asked_of_it(path):
    sentence = f"Unknown pipeline, UNet or LoRA '{path}': there is no folder of that name here; "
    assert refusal(hub.kind, path).startswith(sentence)
    assert "a hub id like owner/name, or one of sdxl, sd15, tiny." in refusal(hub.kind, path)


def test_a_file_of_another_kind_is_named_as_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for path, words in {"out/a.ckpt": "a .ckpt file", "notes": "a file without a suffix"}.items():
        (tmp_path / path).touch()
        assert f"'{path}': it is {words}; name a folder" in refusal(hub.kind, path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    sentence = f"'{tmp_path}' is not a pipeline, UNet or LoRA: it has no {' or '.join(FILES)}."
    assert refusal(hub.kind, str(tmp_path)) == sentence


def test_a_run_and_a_checkpoint_name_the_command_that_exports_a_model(tmp_path):
    for path, file in {"": "run.json", "checkpoints/step_000020": checkpoints.LIST}.items():
        folder = tmp_path / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
        for action in (hub.kind, hub.architecture, lambda name: hub.read_config(name, "unet")):
            sentence = refusal(action, str(folder))
            assert f"`python -m training.export {folder}` writes a model from" in sentence
            kind = "a checkpoint of a run" if path else "a run without a"
            assert sentence.startswith(f"'{folder}' is {kind}")
    (tmp_path / "model_index.json").touch()
    assert hub.kind(str(tmp_path)) == "pipeline"  # the run has finished


# -------------------------------------------------------------------------------------------------
# The hub.


def test_the_hub_is_asked_for_the_files_in_order_and_for_no_more(monkeypatch):
    asked, held = [], set()

    def download(path, file, repo_type):
        asked.append(file)
        if file not in held:
            raise raising(RemoteEntryNotFoundError)
        return file

    monkeypatch.setattr(hub, "hf_hub_download", download)
    for i, expected in enumerate(["pipeline", "unet", "unet", "lora"]):
        asked.clear()
        held |= {FILES[-1], FILES[i]}
        assert hub.kind("owner/name") == expected
        assert asked == FILES[: i + 1]
        held.clear()
    sentence = "'owner/name' is not a pipeline, UNet or LoRA: it has no model_index.json or unet/co"
    assert refusal(hub.kind, "owner/name").startswith(sentence)


TROUBLE = {
    "unreachable": (LocalEntryNotFoundError("no"), "the hub cannot be reached; check the network"),
    "unknown": (raising(RepositoryNotFoundError), "the hub has no such repository, or it is priv"),
    "gated": (raising(GatedRepoError), "the hub asks for a login; accept its terms on its page, "),
    "another": (OSError("403 Error.\n\nForbidden."), "403 Error; name a local folder."),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_with_the_hub_is_not_taken_for_a_repository_without_the_file(monkeypatch, trouble):
    error, words = TROUBLE[trouble]

    def download(path, file, repo_type):
        raise error if "unet" in file else raising(RemoteEntryNotFoundError)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    start = "Cannot load the pipeline, UNet or LoRA 'owner/name': there is no folder of that name "
    assert refusal(hub.kind, "owner/name").startswith(f"{start}here, and {words}")


@pytest.fixture
def network(monkeypatch):
    """network(answer) -> the addresses asked. answer(): what the hub does; it was not asked yet."""

    def install(answer):
        asked = []

        def head(url, timeout):
            asked.append(url)
            return answer()

        monkeypatch.setattr(hub, "get_session", lambda: SimpleNamespace(head=head))
        return asked

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.reachable.cache_clear()
    yield install
    hub.reachable.cache_clear()


def refuse():
    raise OSError("Name or service not known")


def test_a_hub_that_does_not_answer_is_asked_once_and_by_nobody_later(network):
    asked = network(refuse)
    for name in ("owner/name", "owner/other"):
        assert "the hub cannot be reached" in refusal(hub.kind, name)
    assert asked == [constants.ENDPOINT] and constants.HF_HUB_OFFLINE


def test_a_hub_that_hangs_is_given_up(network):
    network(lambda: time.sleep(1))
    start = time.monotonic()
    assert not hub.reachable(seconds=0.05) and time.monotonic() - start < 0.9
    assert constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_with_any_status_is_reachable(network):
    network(lambda: "405 Method Not Allowed")
    assert hub.reachable() and not constants.HF_HUB_OFFLINE


# -------------------------------------------------------------------------------------------------
# Pairs.


def test_pairs_that_are_missing_are_told_before_the_hub_is_asked_for_them(network, tmp_path):
    asked = network(refuse)
    absent = "there is no file or folder of that name here"
    assert f"'nowhere': {absent}; give a .parquet, .csv" in refusal(hub.check_pairs, "nowhere")
    hub.check_pairs("toy")
    hub.check_pairs(str(tmp_path))
    assert not asked
    sentence = f"Cannot read the pairs 'no/such': {absent}, and {hub.UNREACHABLE}."
    assert refusal(hub.check_pairs, "no/such") == sentence


def test_pick_a_pic_left_the_hub_which_is_told_unless_it_is_in_the_cache(
    network, tmp_path, monkeypatch
):
    asked = network(refuse)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "yuvalkirstain___pickapic_v1" / "default" / "0.0.0" / "f00d").mkdir(parents=True)
    sentence = refusal(hub.check_pairs, "yuvalkirstain/pickapic_v2")
    for words in ("off the hub in 2025", str(tmp_path), "--data", "liuhuohuo2/pick-a-pic-v2"):
        assert words in sentence
    (tmp_path / "yuvalkirstain___pickapic_v2" / "default" / "0.0.0" / "f00d").mkdir(parents=True)
    hub.check_pairs("yuvalkirstain/pickapic_v2")
    (tmp_path / "owner___my_pairs" / "default" / "0.0.0" / "f00d").mkdir(parents=True)
    hub.check_pairs("owner/MyPairs")
    assert not asked
