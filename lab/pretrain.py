"""Pretrain the embedded model: SDXL's architecture in small, on the captioned shapes of toy.py.

    python -m lab.pretrain --out assets/tiny-sdxl        # under an hour on two cores with bf16

It has two text encoders, pooled text, time ids, a KL-VAE and a cross-attention UNet, so that
everything that is written for SDXL runs on it; only the weights are few."""

import argparse
import json
from pathlib import Path

from system.program import Parser, reported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.pretrain", __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("assets/tiny-sdxl"), metavar="FOLDER", help="of the model")
    add("--seed", type=int, default=0, help="of everything random")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import diffusers
import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import toy
from weights import saving

# -------------------------------------------------------------------------------------------------
# Architecture.


def write_tokenizer(folder: Path):
    """A CLIP tokenizer that knows each word of the captions as one token.

    Other words are pieced together from letters and endings; digits and signs are unknown."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(x + "</w>" for x in letters)]
    merges = []
    for word in sorted({word for caption in toy.prompts() for word in caption.split()}):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:  # join from the right: r ed</w>, red</w>
            merge, token = (parts[-2], parts[-1]), parts[-2] + parts[-1]
            parts[-2:] = [token]
            if merge not in merges:
                merges.append(merge)
            if token not in vocab:
                vocab.append(token)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n"
    )
    tokenizer = CLIPTokenizer.from_pretrained(
        folder, model_max_length=16, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_pipeline(folder: Path) -> diffusers.StableDiffusionXLPipeline:
    """An untrained StableDiffusionXLPipeline: 64 px, VAE factor 4, 16 x 16 x 4 latents, about 2.5 M
    parameters."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    width = 48
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=toy.SIZE,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=toy.SIZE // 4,
        layers_per_block=1,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 3),  # heads per block: diffusers keeps the old name
        transformer_layers_per_block=1,
        cross_attention_dim=2 * width,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + width,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing="trailing",  # starts at the noisiest timestep, which few steps need
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


# -------------------------------------------------------------------------------------------------
# Training.

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # where a CPU emulates it, fp32 is much faster


def train_vae(vae, images, steps: int, batch: int = 16, lr: float = 1.5e-3):
    """Reconstruct pixels (L1 and L2), colour and edges, with a light KL to N(0, I).

    Colour, the difference of a pixel from its grey, is weighted up: it is a small part of the
    energy of pictures that are mostly background. Edges, the differences of neighbours, keep
    sharpness."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in (bar := tqdm(range(steps), desc="VAE")):
        x = images[torch.randint(len(images), (batch,))]
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        error = y - x
        l1, l2 = error.abs().mean(), error.square().mean()
        color = (error - error.mean(dim=1, keepdim=True)).square().mean()
        edges = sum(error.diff(dim=d).abs().mean() for d in (2, 3))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (l1 + 4 * l2 + 10 * color + 0.5 * edges + 1e-4 * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(l1=f"{l1:.4f}", color=f"{color:.4f}", edges=f"{edges:.4f}", kl=f"{kl:.2f}")


def train_unet(
    pipeline, latents, captions: list[str], steps: int, batch: int = 64, lr: float = 1e-3
):
    """Ordinary epsilon training of UNet and text encoders, one caption in ten SDXL's zeros.

    Weights are averaged exponentially, 0.999 a step; the average stays in the pipeline."""
    names = sorted(set(captions))
    ids = pipeline.tokenizer(names, padding="max_length", return_tensors="pt").input_ids
    index = torch.tensor([names.index(caption) for caption in captions])
    time_ids = torch.tensor([[toy.SIZE, toy.SIZE, 0.0, 0.0, toy.SIZE, toy.SIZE]] * batch)
    abar = pipeline.scheduler.alphas_cumprod
    modules = torch.nn.ModuleList(
        [pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2]
    ).train()
    ema = AveragedModel(modules, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    average = None
    for _ in (bar := tqdm(range(steps), desc="UNet")):
        rows = torch.randint(len(latents), (batch,))
        t = torch.randint(len(abar), (batch,))
        x0, noise = latents[rows], torch.randn(batch, *latents.shape[1:])
        signal = abar[t].view(-1, 1, 1, 1)
        xt = signal.sqrt() * x0 + (1 - signal).sqrt() * noise
        keep = (torch.rand(batch) >= 0.1).float().unsqueeze(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            words = ids[index[rows]]
            first = pipeline.text_encoder(words, output_hidden_states=True)
            second = pipeline.text_encoder_2(words, output_hidden_states=True)
            text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
            text = text * keep.unsqueeze(2)
            added = {"text_embeds": second.text_embeds * keep, "time_ids": time_ids}
            eps = pipeline.unet(xt, t, text, added_cond_kwargs=added, return_dict=False)[0].float()
        loss = (eps - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(modules)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}")
    modules.load_state_dict(ema.module.state_dict())
    modules.eval()


def pretrain(
    folder: str | Path,
    seed: int = 0,
    n: int = 20_000,
    vae_steps: int = 3000,
    unet_steps: int = 3600,
):
    """Draw n pictures, train the VAE, then UNet and text encoders on its latents; save all of it.

    UNet and VAE are kept in fp16, the small text encoders in fp32."""
    rng, every, folder = np.random.default_rng([seed, 0]), toy.prompts(), Path(folder)
    captions = [every[i % len(every)] for i in range(n)]
    pixels = np.stack([np.asarray(toy.draw(caption, rng)) for caption in captions])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.manual_seed(seed)
    pipeline = build_pipeline(folder)
    train_vae(pipeline.vae, images, vae_steps)
    with torch.no_grad():
        latents = torch.cat([pipeline.vae.encode(x).latent_dist.mean for x in images.split(100)])
    pipeline.vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    torch.manual_seed(seed + 1)
    train_unet(pipeline, latents * pipeline.vae.config.scaling_factor, captions, unet_steps)
    pipeline.unet.half()
    pipeline.vae.half()
    saving.write_pipeline(pipeline, folder)


def main(argv: list[str] | None = None):
    args = parse(argv)
    with reported("lab.pretrain"):
        pretrain(args.out, args.seed)


if __name__ == "__main__":
    main()
