"""LoRA files, put into a pipeline."""

from functools import partial

from diffusers import DiffusionPipeline
from safetensors import safe_open

from system.files import UserError
from system.hub import lora_file, one_sentence
from weights.modules import modules_of


def fuse_lora(pipeline: DiffusionPipeline, path: str):
    """Put W + alpha/r B A in the place of W. Fused, so that identity() sees the scale.

    Raises UserError, see `load_lora`."""
    load_lora(pipeline, path)
    sentence = f"The LoRA '{path}' does not fit '{pipeline.config._name_or_path}'"
    one_sentence(lambda: pipeline.fuse_lora(safe_fusing=True), sentence)
    pipeline.unload_lora_weights()


def load_lora(pipeline: DiffusionPipeline, path: str):
    """Add a LoRA as the adapter "it".

    Raises UserError for a tensor that matches nothing, of which diffusers only warns."""

    def plain(key: str) -> str:  # one form for a key of peft, diffusers or kohya; .it. is our name
        key = key.replace(".processor", "").replace(".it.", ".").replace(".", "_")
        return key.replace("lora_down", "lora_A").replace("lora_up", "lora_B")

    sentence = f"The LoRA '{path}' does not fit '{pipeline.config._name_or_path}'"
    file = lora_file(path)
    with one_sentence(lambda: safe_open(file, "pt"), sentence) as lora:
        keys = [key for key in lora.keys() if not key.endswith(".alpha")]
        given = {plain(key.removeprefix("lora_")): key for key in keys}
    load = partial(pipeline.load_lora_weights, file, adapter_name="it", use_safetensors=True)
    one_sentence(load, sentence)
    loaded = [f"{part}.{key}" for part, m in modules_of(pipeline).items() for key in m.state_dict()]
    found = {plain(key): key.replace(".it.", ".") for key in loaded if ".it." in key}
    if len(given) != len(found):
        odd = (found | given)[min(given.keys() ^ found.keys())]
        raise UserError(f"{sentence}: {odd} has no counterpart.")
