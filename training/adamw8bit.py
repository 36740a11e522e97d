"""AdamW with both moments in 8 bits, by blocks of 256 (Dettmers et al., 2110.02861): bitsandbytes'.

    "optimizer": {"type": "AdamW8bit", "params": {"betas": [0.9, 0.999], ...}}   in a ds_config.json

The fp32 master weights stay; the moments take 2.03 bytes a trained parameter in place of 8. ZeRO-1
and 2 hand it flat partitions, which an elementwise update does not see but in where blocks begin.
DeepSpeed's universal checkpoints know no such moments: a run resumes on the same ranks and stage.
"""

from deepspeed.accelerator import get_accelerator

from system.files import UserError
from system.hub import one_sentence
from training.quantized import LIBRARY

NAME, BYTES = "adamw8bit", 2 + 2 * 4 / 256  # of the moments, a parameter


def asked_for(ds_config: dict) -> bool:
    return ds_config.get("optimizer", {}).get("type", "").lower() == NAME


def check(ds_config: dict, file: str):
    """Raises UserError where it is asked for and cannot be had."""
    if not asked_for(ds_config):
        return
    zero = ds_config["zero_optimization"]
    if zero["stage"] == 3 or zero.get("offload_optimizer", {}).get("device", "none") != "none":
        raise UserError(
            f"--ds-config {file}: AdamW8bit goes with ZeRO-1 and ZeRO-2 on the GPU alone; take "
            "AdamW for ZeRO-3 and for offload."
        )
    device = get_accelerator().current_device_name()

    def attempt():
        import torch

        weight = torch.zeros(4096, device=device, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        create(ds_config)([weight]).step()

    words = f"--ds-config {file}: AdamW8bit does not work on this {device.partition(':')[0]}"
    one_sentence(attempt, f"{words} (it takes a library: pip install {LIBRARY})")


def create(ds_config: dict):
    """The function that makes it of parameters, as deepspeed.initialize takes it."""
    from bitsandbytes.optim import AdamW8bit

    given = ds_config["optimizer"]["params"]
    known = {key: given[key] for key in ("lr", "betas", "eps", "weight_decay") if key in given}
    return lambda parameters: AdamW8bit(parameters, **known)


def arguments(ds_config: dict) -> dict:
    """config and, for this optimizer, optimizer of deepspeed.initialize."""
    if not asked_for(ds_config):
        return {"config": ds_config}
    rest = {key: value for key, value in ds_config.items() if key != "optimizer"}
    rest["zero_allow_untested_optimizer"] = True
    return {"config": rest, "optimizer": create(ds_config)}
