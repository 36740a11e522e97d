"""Write the model of a run, or of one of its checkpoints, without training.

    python -m training.export out/sdxl-inpo                                 # newest checkpoint
    python -m training.export out/sdxl-inpo/checkpoints/step_000200         # this one
    python -m training.export out/sdxl-inpo --to unet --dtype fp16          # UNet alone, half size
    python -m training.export out/sdxl-lora --to pipeline --out sdxl-mine   # adapters merged
    python -m training.export out/sdxl-inpo --to single-file               # for ComfyUI, A1111
    python -m training.export out/sdxl-inpo --upload me/sdxl-inpo --private # to the hub

Writes a folder with a diffusers pipeline, a UNet, a LoRA (pytorch_lora_weights.safetensors, and
comfyui_lora.safetensors for ComfyUI, Forge and A1111), or the whole model in one file in the
original layout (TITLE.safetensors), and a model card; the folder is complete or absent, and the
same command again leaves it alone. Weights are the fp32 master weights, rounded once; all else is
the model that the run started from. --upload sends the model, its card, curves and sample pictures
to the hub (HF_ENDPOINT names another server): of a finished run the model in its folder, unless
--to, --dtype or --out ask for an export; also of RUN/best and RUN/unets/step_*. Checkpoints are
pickles: open only those of your own runs.
"""

import argparse
import contextlib
import glob
import shutil
from pathlib import Path

from system.hub import repository
from system.program import Parser, reported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("training.export", __doc__)
    add = parser.add_argument
    add("path", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints/step_*")
    add("--to", choices=("pipeline", "unet", "lora", "single-file"),
        help="(if not given: lora for a LoRA run, else pipeline)")  # fmt: skip
    add("--dtype", choices=("fp32", "fp16", "bf16"),
        help="of the weights (if not given: fp16 for a single file, else fp32)")  # fmt: skip
    add("--out", type=Path, help="(if not given: exports/ in the run's folder)", metavar="FOLDER")
    add("--upload", type=repository, metavar="OWNER/NAME",
        help="send it to this repository of the hub, made where there is none")  # fmt: skip
    add("--private", action="store_true", help="of --upload: only its owner sees it")
    args = parser.parse_args(argv)
    if args.private and not args.upload:
        parser.error("--private: has no meaning without --upload OWNER/NAME")
    return args


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import sys
import zlib

import torch
from safetensors import SafetensorError

import model
from system import checkpoint, hub
from system.files import UserError, replacing
from system.text import markdown, printable
from training import card, lora, upload
from training.folder import list_result, read_metrics, read_record, read_result
from training.plan import compute_dtype
from weights import original, saving

WHERE = {
    "unet": "In ComfyUI, diffusion_pytorch_model.safetensors belongs into models/diffusion_models, "
    'for the node "Load Diffusion Model"; the base model gives VAE and text encoders.',
    "single-file": "The .safetensors file in it belongs into models/checkpoints of ComfyUI, or "
    "models/Stable-diffusion of A1111 and Forge.",
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def find(path: Path) -> Path:
    """The checkpoint that a run's folder or a checkpoint's folder means. Raises UserError."""
    if (path / checkpoint.LIST).exists():
        return path
    if found := checkpoint.complete(path / "checkpoints"):
        return found[0]
    if not (path / "run.json").exists():
        raise UserError(
            f"{path}: is neither a run's folder nor a checkpoint; name the --out of a run, or a "
            "checkpoints/step_* in it."
        )
    raise UserError(
        f"{path}: has no checkpoint; if the run has finished, the folder is the model itself, else "
        "repeat its command with --checkpoint-every."
    )


def load(settings: argparse.Namespace, path: Path):
    """(the pipeline that the run started from, in fp32; what was trained, by name; a warning where
    that start is not the one that the run saw, else "")."""
    weights, identities = checkpoint.weights(path), set()
    hub.say(settings.model, settings)
    dtype = compute_dtype(settings.ds_config)
    if dtype != torch.float32:  # the run's own, unless it ran on a CPU
        identities.add(model.identity(lora.load_start(settings, dtype)))
    pipeline = lora.load_start(settings, torch.float32)
    identities.add(model.identity(pipeline))
    unet = pipeline.unet
    trained = lora.trainable(unet) if lora.trains_adapters(settings) else unet.state_dict()
    if {k: w.shape for k, w in trained.items()} != {k: w.shape for k, w in weights.items()}:
        raise UserError(
            f"{path}: does not fit {settings.unet or settings.model}, which has changed since the "
            "run."
        )
    unet.load_state_dict(weights, strict=False)
    if settings.start_identity in identities:
        return pipeline, weights, ""
    warning = (
        f"Warning: {settings.model}, what was put into it, or a library has changed since the run, "
        "so this may not be the model that was trained."
    )
    return pipeline, weights, warning


def written(out: Path, source: list) -> bool:
    """Whether `out` holds an export of that checkpoint, to that, whole."""
    with contextlib.suppress(UserError):
        return read_result(out).get("of") == source
    return False


def export(path: Path, kind: str | None, dtype: str | None, out: Path | None) -> Path:
    """Write what `path` holds as a "pipeline", "unet", "lora" or "single-file" (None: lora for a
    LoRA run, else pipeline) to out (None: exports/ in the run's folder). Returns the folder."""
    path = find(path.resolve())
    folder, step = path.parent.parent, checkpoint.read_list(path)["step"]
    settings = argparse.Namespace(**read_record(folder))
    facts = card.read(folder / "card.json", "an export needs what it says of the run")
    adapters = lora.trains_adapters(settings)
    kind = kind or ("lora" if adapters else "pipeline")
    if kind == "lora" and not adapters:
        raise UserError(f"--to lora: {folder} trained the whole UNet; take pipeline or unet.")
    dtype = dtype or ("fp16" if kind == "single-file" else "fp32")
    out = (out or folder / "exports" / f"{path.name}-{kind}-{dtype}").resolve()
    source = [zlib.crc32((path / checkpoint.LIST).read_bytes()), kind, dtype]
    if written(out, source):
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not empty; name another folder.")

    pipeline, weights, warning = load(settings, path)
    text = card.render(facts | {"adapters": kind == "lora"}, read_metrics(folder, step))
    if warning:
        print(printable(warning), file=sys.stderr)
        text += f"\n{markdown(warning)}\n"
    unet = pipeline.unet
    if kind != "lora" and adapters:
        unet.fuse_lora(safe_fusing=True)
        unet.unload_lora()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f"{glob.escape(out.name)}.*.new"):  # an export was killed
            shutil.rmtree(left, ignore_errors=True)
        with replacing(out) as scratch:
            scratch.mkdir()
            if kind == "lora":
                lora.save(weights, unet, scratch, facts["title"], DTYPES[dtype])
            elif kind == "unet":
                unet.to(DTYPES[dtype]).save_pretrained(scratch, max_shard_size="1TB")  # one file
            elif kind == "single-file":
                file = scratch / f"{facts['title']}.safetensors"
                architecture = hub.architecture(settings.model)
                original.save(pipeline, architecture, file, DTYPES[dtype], facts["title"])
            else:
                saving.write_pipeline(pipeline.to(DTYPES[dtype]), scratch)
            list_result(scratch, [file.name for file in scratch.iterdir()], step, of=source)
            (scratch / "README.md").write_text(text)
    except (OSError, SafetensorError) as error:  # a full disk raises one or the other
        raise UserError(f"--out {out}: was not written ({error}).") from error
    return out


def main(argv: list[str] | None = None):
    args = parse(argv)
    with reported("training.export"):
        if args.upload:
            share(args)
            return
        out = export(args.path, args.to, args.dtype, args.out)
    print(f"Wrote {printable(str(out))}.")
    if args.to in WHERE:
        print(WHERE[args.to])


def share(args: argparse.Namespace):
    """Upload the model that a folder is, or the export of a checkpoint."""
    there = upload.lying_in(args.path)
    whole = (
        there and args.to in (None, there.kind) and args.dtype in (None, "fp32") and not args.out
    )
    path = None if whole else find(args.path.resolve())
    upload.facts(there.run if whole else path.parent.parent)  # raises, before the hub is asked
    private = upload.prepare(args.upload, args.private)
    if not whole:
        there = upload.exported(export(path, args.to, args.dtype, args.out), path)
    print(f"It is at {upload.send(there, args.upload, private)}.")


if __name__ == "__main__":
    main()
