"""Folders of pictures that others drew, or that are damaged: used, or refused in one sentence."""

import json
import math
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal
from PIL import Image

import evaluate
import toy
from evaluation import gallery
from evaluation.prompts import PromptSet

TWO = toy.prompts("heldout")[:2]


def draw(folder: Path, **changes) -> Path:
    """A folder of two toy pictures as evaluate.py leaves it, but for what is changed."""
    folder.mkdir(parents=True)
    for k, prompt in enumerate(TWO):
        toy.draw(prompt, np.random.default_rng(k), 0.9, 0.5).save(folder / f"{k:05d}.png")
    images = gallery.plan_images(PromptSet("toy", TWO, None))
    manifest = {"name": "a", "model": "m", "base": None, "architecture": "sdxl", "set": "toy"}
    manifest |= {"prompts": 2, "steps": 25, "guidance": 2.0, "batch": 16, "dtype": "float32"}
    manifest |= {"size": 64, "identity": "0" * 16, "torch": "2", "diffusers": "0", "images": images}
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


def judge(*folders: Path):
    models = [f"m{k}={folder}" for k, folder in enumerate(folders)]
    evaluate.main(["--models", *models, "--out", str(folders[0].parent / "out")])


WRONG = [None, True, 5, -1, 0.5, math.nan, 10**400, "", "x", "\ud800", [], [1], {}, {"a": 1}]


@pytest.mark.parametrize(
    "field",
    "name model base architecture set prompts steps guidance batch dtype size identity torch images"
    " file prompt seed category".split(),
)
def test_a_manifest_with_a_wrong_value_is_used_or_refused_in_one_sentence(field, tmp_path, capsys):
    good, fine = draw(tmp_path / "good"), 0
    bad = draw(tmp_path / "bad")
    whole = json.loads((bad / "manifest.json").read_text())
    for value in WRONG:
        manifest = json.loads(json.dumps(whole))
        place = (
            manifest["images"][1] if field in ("file", "prompt", "seed", "category") else manifest
        )
        place[field] = value
        (bad / "manifest.json").write_text(json.dumps(manifest))
        try:
            judge(good, bad)
            fine += 1
        except SystemExit as stop:
            assert stop.code == 2, value
            said = capsys.readouterr().err.splitlines()[-1]
            assert said.startswith("evaluate.py: error: "), value
    refused = {"set": 10, "prompts": 14, "images": 14, "file": 14, "prompt": 14}
    assert fine < len(WRONG) and fine <= len(WRONG) - refused.get(field, 3)


TEXTS = [
    "",
    "null",
    "[]",
    "5",
    "{",
    "{}",
    '{"images": {}}',
    '{"images": []}',
    "\0" * 50,
    "\xff\xfe",
]
TEXTS += ["[" * 10**5, '{"images": ' + "[" * 10**5]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_damaged_manifest_is_one_sentence(text, tmp_path):
    folder = draw(tmp_path / "bad")
    (folder / "manifest.json").write_text(text, "latin-1")
    assert "manifest.json" in refusal(gallery.read_manifest, folder)
    assert "manifest.json" in refusal(gallery.refuse_others, folder, {"images": []})


OUTSIDE = [
    "../secret.png",
    "/etc/passwd",
    "sub/0.png",
    "..",
    ".",
    "a\0.png",
    "",
    7,
    None,
    ["0.png"],
]


@pytest.mark.parametrize("file", OUTSIDE, ids=range(len(OUTSIDE)))
def test_a_manifest_names_files_of_its_own_folder_alone(file, tmp_path):
    folder = draw(tmp_path / "bad")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["images"][1]["file"] = file
    (folder / "manifest.json").write_text(json.dumps(manifest))
    told = refusal(gallery.read_manifest, folder)
    assert "file of image 1 is not the name of a file in its folder" in told


# --------------------------------------------------------------------------------------------------
# Pictures.


def grey(side: int, height: int = 1) -> bytes:
    """A PNG of 1 bit that says so many pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = side.to_bytes(4) + height.to_bytes(4) + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes((side + 7) // 8 + 1) * height, 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_a_picture_of_too_many_pixels_is_one_sentence_before_anything_is_drawn(side, tmp_path):
    """PIL warns of one and raises an error of its own, no OSError, for the other."""
    folder = draw(tmp_path / "bad")
    (folder / "00001.png").write_bytes(grey(side, side))
    told = refusal(gallery.read_pictures, folder, PromptSet("toy", TWO, None))
    assert "00001.png' cannot be read as a picture (" in told and "pixels" in told
    assert "pixels" in refusal(gallery.open_image, folder / "00001.png")


def test_pictures_are_judged_as_training_sees_them(tmp_path):
    """Deep grey is scaled, not clipped; transparency is white; the camera's orientation counts."""
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((ramp / 257).astype(np.uint8)).save(tmp_path / "plain.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    turned = Image.fromarray(np.arange(8, dtype=np.uint8).reshape(4, 2) * 30)
    turned.getexif()[274] = 6
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif(), quality=100)
    deep, plain = (
        np.asarray(gallery.open_image(tmp_path / f"{n}.png"), int) for n in ("deep", "plain")
    )
    assert np.abs(deep - plain).max() <= 1
    assert np.asarray(gallery.open_image(tmp_path / "clear.png")).min() == 255
    assert gallery.open_image(tmp_path / "turned.jpg").size == (4, 2)


def test_what_is_named_like_a_picture_and_is_none_is_one_sentence(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for ever
    (tmp_path / "huge.png").touch()
    os.truncate(tmp_path / "huge.png", 10**12)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(grey(1000, 1000)[:60])
    for name in ("folder", "pipe", "huge", "text", "half", "absent"):
        assert f"{name}.png' cannot be read as a picture (" in refusal(
            gallery.open_image, tmp_path / f"{name}.png"
        )
    assert gallery.pictures(tmp_path) == ["half.png", "huge.png", "text.png"]
