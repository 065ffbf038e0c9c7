"""Stage 0: train the toy autoencoder, a small KL-f4, on the maps of toy_scenes.py.

    python toy_vae.py --out vae0.safetensors                                    # encoder and decoder
    python toy_vae.py --init vae0.safetensors --out vae.safetensors --seed 1    # the decoder alone
"""
import json
import pathlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save
from tqdm import tqdm

import toy_scenes
from distributed import autocast, check_apart, check_ranges, command_parser, run, setup, whole_file
from modalities import MODALITIES
from vae import TOY_CONFIG, AutoencoderKL, find_vae, load_vae

JUDGED = 64  # held-out scenes of the printed PSNR


def images(start, count, device):
    """The maps of `count` scenes -> pixels (count * len(MAPS), 3, 64, 64), those of a scene together.

    In fp16, which holds 8 bits.
    """
    scenes = (toy_scenes.maps(toy_scenes.render(seed)) for seed in range(start, start + count))
    pixels = [MODALITIES[m].to_pixels(array) for scene in scenes for m, array in scene.items()]
    return torch.from_numpy(np.stack(pixels).astype(np.float16)).to(device)


def _by_map(x):
    """{modality: its rows} of what belongs to scenes as in images()."""
    return {m: x[i::len(toy_scenes.MAPS)] for i, m in enumerate(toy_scenes.MAPS)}


@torch.inference_mode()
def psnr(vae, pixels):
    """Reconstruction PSNR in dB of pixels (n, 3, S, S) in [-1, 1] through the posterior mean."""
    error = [(vae.decode(vae.encode(x)[0]).clamp(-1, 1) - x).square().mean((1, 2, 3))
             for x in pixels.split(64)]
    return float(-10 * torch.log10(torch.cat(error) / 4).mean())


def losses(vae, x):
    """Pixels (N, 3, S, S) -> reconstruction loss and KL term, the latter a mean over the latent elements."""
    with autocast(x.device, "bf16"):
        mean, logvar = vae.encode(x)
        out = vae.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).float()
    kl = 0.5 * (mean.float().square() + logvar.float().exp() - 1 - logvar.float()).mean()
    return F.mse_loss(out, x) + 0.02 * F.l1_loss(out, x), kl


def train(vae, learning, data, held_out, steps, batch_size, lr, kl_weight):
    """Train the part `learning` of the vae on data, fp16 pixels; print the PSNR on held_out, fp32, now and
    then.
    """
    optimiser = torch.optim.AdamW(learning.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, steps, pct_start=0.05)
    bar = tqdm(range(1, steps + 1), desc="vae")
    for step in bar:
        rows = torch.randint(len(data), (batch_size,), device=data.device)
        reconstruction, kl = losses(vae, data[rows].float())
        loss = reconstruction + kl_weight * kl
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learning.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            quality = {m: round(psnr(vae, part), 1) for m, part in _by_map(held_out).items()}
            bar.write(f"step {step} loss {loss.item():.5f} kl {kl.item():.2f} held-out PSNR {quality}")


def main():
    """Train the toy autoencoder, or with --init its decoder alone, and write it."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True, help="safetensors file to write, fp16")
    add("--steps", type=int, default=3000)
    add("--scenes", type=int, default=4000, help="training scenes, an image of each map")
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=1e-3)
    add("--kl", type=float, default=2e-5, help="weight of the KL term, per latent element")
    add("--init", help="polish this VAE: only its decoder learns, so that cached latents stay valid")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    check_ranges(args, steps=(1, None), scenes=(1, 10 ** 6), batch_size=(1, None), lr=(1e-12, 1000),
                 kl=(0, 1000), seed=(0, 2 ** 63 - 1))
    check_apart([args.out], [args.init and find_vae(args.init)])
    _, _, device = setup()
    torch.manual_seed(args.seed)
    data = images(0, args.scenes, device)
    held_out = images(toy_scenes.HELD_OUT, JUDGED, device).float()
    vae = load_vae(args.init) if args.init else AutoencoderKL(**TOY_CONFIG)
    vae = vae.to(device, memory_format=torch.contiguous_format).train()
    learning = nn.ModuleList([vae.decoder, vae.post_quant_conv] if args.init else [vae])
    learning.requires_grad_(True)
    print(f"toy VAE: {sum(p.numel() for p in vae.parameters()):,} parameters, {len(data)} images, "
          f"device {device}")
    train(vae, learning, data, held_out, args.steps, args.batch_size, args.lr, args.kl)
    with torch.inference_mode():
        latents = torch.cat([vae.encode(x.float())[0] for x in data[:2048].split(64)])
    scale = vae.scale  # an encoder that was kept keeps its scale
    if not args.init:
        scale = round(1 / float(latents.std()), 5)
    state = {key: value.to(torch.float16).contiguous().cpu() for key, value in vae.state_dict().items()}
    with whole_file(args.out) as file:
        file.write(save(state, metadata={"config": json.dumps({**vae.config, "scale": scale})}))
    spread = {m: round(float(part.std()), 3) for m, part in _by_map(latents).items()}
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, scale {scale}, "
          f"latent std by modality {spread}")


if __name__ == "__main__":
    run(main)
