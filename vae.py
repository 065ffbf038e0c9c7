"""The Stable Diffusion autoencoder (KL-f8) in plain torch, and the toy VAE in a small configuration.

    python vae.py --out demo/vae.safetensors      # train the toy VAE on toy_scenes.py

Module names are those of the released files (stabilityai/sd-vae-ft-mse, -ema), which load with strict=True.
Latents are unscaled here; AutoencoderKL.scale brings them to about unit variance.
"""
import argparse
import hashlib
import json
import pathlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

import toy_scenes
from distributed import InputError, run, setup, whole_file
from model import MODALITIES

SD_CONFIG = dict(channels=(128, 256, 512, 512), layers=2, groups=32, latent_channels=4, scale=0.18215)
TOY_CONFIG = dict(channels=(32, 64, 64), layers=1, groups=8, latent_channels=4, scale=1.0)
RELEASED = {"sd-mse": "stabilityai/sd-vae-ft-mse", "sd-ema": "stabilityai/sd-vae-ft-ema"}
BUNDLED = pathlib.Path(__file__).parent / "demo" / "vae.safetensors"


class ResnetBlock(nn.Module):
    def __init__(self, inner, outer, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inner, eps=1e-6)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outer, eps=1e-6)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        if inner != outer:
            self.conv_shortcut = nn.Conv2d(inner, outer, 1)

    def forward(self, x):                                      # (N, inner, H, W)
        h = self.conv1(F.silu(self.norm1(x)))                  # (N, outer, H, W)
        h = self.conv2(F.silu(self.norm2(h)))                  # (N, outer, H, W)
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all places."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):                                                                # (N, c, H, W)
        h = self.group_norm(x).flatten(2).transpose(1, 2)                                # (N, HW, c)
        h = F.scaled_dot_product_attention(*(f(h)[:, None] for f in (self.to_q, self.to_k, self.to_v)))[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)                    # (N, c, H, W)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # padded right and below only, as released


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """The resnets of one resolution, then a resampler (none at the last stage)."""

    def __init__(self, inner, outer, layers, groups, name=None, resampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(inner if i == 0 else outer, outer, groups) for i in range(layers))
        if resampler is not None:
            self.add_module(name, nn.ModuleList([resampler(outer)]))

    def forward(self, x):
        for part in self.children():
            for layer in part:
                x = layer(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, channels, layers, groups, latent_channels):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        last = len(channels) - 1
        self.down_blocks = nn.ModuleList(
            Stage(channels[max(i - 1, 0)], channels[i], layers, groups, "downsamplers", Downsample if i < last else None)
            for i in range(len(channels)))
        self.mid_block = Middle(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):                                    # (N, 3, fH, fW)
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        x = self.mid_block(x)                                # (N, channels[-1], H, W)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (N, 2C, H, W)


class Decoder(nn.Module):
    def __init__(self, channels, layers, groups, latent_channels):
        super().__init__()
        channels = channels[::-1]
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        last = len(channels) - 1
        self.up_blocks = nn.ModuleList(
            Stage(channels[max(i - 1, 0)], channels[i], layers + 1, groups, "upsamplers", Upsample if i < last else None)
            for i in range(len(channels)))
        self.mid_block = Middle(channels[0], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z):                                    # (N, C, H, W)
        x = self.mid_block(self.conv_in(z))                  # (N, channels[-1], H, W)
        for stage in self.up_blocks:
            x = stage(x)
        with torch.autocast(z.device.type, enabled=False):  # pixels in fp32: depth has more than 8 bits
            return self.conv_out(F.silu(self.conv_norm_out(x.float())))  # (N, 3, fH, fW)


class AutoencoderKL(nn.Module):
    """KL-regularised autoencoder; factor = 2 ** (stages - 1) pixels per latent."""

    def __init__(self, channels, layers, groups, latent_channels, scale):
        super().__init__()
        self.config = dict(channels=list(channels), layers=layers, groups=groups, latent_channels=latent_channels, scale=scale)
        self.scale, self.latent_channels, self.factor = scale, latent_channels, 2 ** (len(channels) - 1)
        self.encoder = Encoder(channels, layers, groups, latent_channels)
        self.decoder = Decoder(channels, layers, groups, latent_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, x):
        """Pixels (N, 3, fH, fW) in [-1, 1] -> mean, logvar, each (N, C, H, W), unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """Unscaled latents (N, C, H, W) -> pixels (N, 3, fH, fW), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


def sha256(path):
    """Hex digest of a file: weights are named by content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_vae(name):
    """The file of "toy" (bundled), "sd-mse" / "sd-ema" (the hub's cache, else downloaded) or a path."""
    if name == "toy":
        return BUNDLED
    if name not in RELEASED:
        return pathlib.Path(name)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(RELEASED[name], "diffusion_pytorch_model.safetensors"))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(f"--vae {name}: cannot get {RELEASED[name]} ({type(error).__name__}); download its "
                         "diffusion_pytorch_model.safetensors elsewhere and pass --vae FILE, or use --vae toy")


def load_vae(name_or_path):
    """An AutoencoderKL in eval mode from "toy", "sd-mse", "sd-ema" or a safetensors file.

    A file without our configuration in its metadata is taken for the released SD configuration;
    the attention names of older files (query, key, value, proj_attn) are mapped.
    Raises InputError when the file is missing, unreadable or of another shape.
    """
    path = find_vae(name_or_path)
    if not path.is_file():
        raise InputError(f"--vae {name_or_path}: no such file; give a .safetensors file, sd-mse, sd-ema or toy")
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "null")) or SD_CONFIG
            state = {key: file.get_tensor(key).float() for key in file.keys()}
        vae = AutoencoderKL(**config)
    except (SafetensorError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"--vae {path}: not a readable safetensors file of a VAE ({error}); download or train it again")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        for kind in ("weight", "bias"):
            for side in ("encoder", "decoder"):
                key = f"{side}.mid_block.attentions.0.{old}.{kind}"
                if key in state:
                    tensor = state.pop(key)
                    state[f"{side}.mid_block.attentions.0.{new}.{kind}"] = tensor[..., 0, 0] if tensor.dim() == 4 else tensor
    try:
        vae.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InputError(f"--vae {path}: {str(error).splitlines()[1].strip()}; not an SD or toy VAE")
    vae.path = path
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------
# Training entry of the toy VAE.

def psnr(vae, pixels, batch=64):
    """Reconstruction PSNR in dB of pixels (n, 3, S, S) in [-1, 1] through the posterior mean."""
    with torch.inference_mode():
        error = [(vae.decode(vae.encode(x)[0]).clamp(-1, 1) - x).square().mean((1, 2, 3)) for x in pixels.split(batch)]
    return float(-10 * torch.log10(torch.cat(error) / 4).mean())


def main():
    """Train the toy autoencoder, or with --init its decoder alone, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="safetensors file to write, fp16")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--scenes", type=int, default=4000, help="training scenes, four images each")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--kl", type=float, default=2e-5, help="weight of the KL term, per latent element")
    parser.add_argument("--init", help="polish this VAE: only its decoder learns, so that cached latents stay valid")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.steps, args.scenes, args.batch_size) < 1 or not 0 < args.lr < 1e3 or not 0 <= args.kl < 1e3 or not 0 <= args.seed < 2 ** 63 or args.scenes > 10 ** 6:
        raise InputError(f"--steps {args.steps} --scenes {args.scenes} --batch-size {args.batch_size}: at least 1, at most a million scenes; --lr {args.lr} --kl {args.kl} --seed {args.seed}: finite, not negative")
    _, _, device = setup()
    torch.manual_seed(args.seed)

    def pixels(start, count):
        scenes = (toy_scenes.maps(toy_scenes.render(seed)) for seed in range(start, start + count))
        images = [MODALITIES[m].to_pixels(scene[m]) for scene in scenes for m in scene]
        return torch.from_numpy(np.stack(images).astype(np.float16)).to(device)  # fp16 holds 8-bit pixels exactly enough

    data = pixels(0, args.scenes)
    held_out = pixels(toy_scenes.HELD_OUT, 64).float()
    vae = (load_vae(args.init) if args.init else AutoencoderKL(**TOY_CONFIG)).to(device, memory_format=torch.contiguous_format).train()
    learning = nn.ModuleList([vae.decoder, vae.post_quant_conv] if args.init else [vae]).requires_grad_(True)
    print(f"toy VAE: {sum(p.numel() for p in vae.parameters()):,} parameters, {len(data)} images, device {device}")
    optimiser = torch.optim.AdamW(learning.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, args.steps, pct_start=0.05)
    bar = tqdm(range(1, args.steps + 1), desc="vae")
    for step in bar:
        x = data[torch.randint(len(data), (args.batch_size,), device=device)].float()
        with torch.autocast(device.type, torch.bfloat16):
            mean, logvar = vae.encode(x)
            reconstruction = vae.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean))
        kl = 0.5 * (mean.float().square() + logvar.float().exp() - 1 - logvar.float()).mean()
        loss = F.mse_loss(reconstruction.float(), x) + 0.02 * F.l1_loss(reconstruction.float(), x) + args.kl * kl
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learning.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 250 == 0 or step == args.steps:
            quality = {m: round(psnr(vae, held_out[i::4]), 1) for i, m in enumerate(("rgb", "depth", "normal", "seg"))}
            bar.write(f"step {step} loss {loss.item():.5f} kl {kl.item():.2f} held-out PSNR {quality}")
    with torch.inference_mode():  # an encoder that was kept keeps its scale
        latents = torch.cat([vae.encode(x.float())[0] for x in data[:2048].split(64)])
    config = {**vae.config, "scale": vae.scale if args.init else round(1 / float(latents.std()), 5)}
    state = {k: v.to(torch.float16).contiguous().cpu() for k, v in vae.state_dict().items()}
    with whole_file(args.out) as file:
        file.write(save(state, metadata={"config": json.dumps(config)}))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, scale {config['scale']}, latent std by modality "
          f"{[round(float(latents[i::4].std()), 3) for i in range(4)]}")


if __name__ == "__main__":
    run(main)
