"""TAESD (madebyollin): a tiny autoencoder of Stable Diffusion's latents, 2 x 1.2M parameters, two files.

Module names are the files' indices of one Sequential. Its pixels are in [0, 1], its latents at the scale of
Stable Diffusion's times 0.18215; there is no posterior, a picture has one latent.
"""
import hashlib
import pathlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

from distributed import InputError, autocast, check, reading, sha256, utf8_path

HUB = "madebyollin/taesd"
FILES = {"encoder": "taesd_encoder.safetensors", "decoder": "taesd_decoder.safetensors"}
LOG_STD = -15.0  # a posterior sample is the mean


# ------------------------------------------------------------------------------------------------
# The network.

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(_conv(64, 64), nn.ReLU(), _conv(64, 64), nn.ReLU(), _conv(64, 64))

    def forward(self, x):  # (N, 64, H, W)
        return F.relu(self.conv(x) + x)


class Bound(nn.Module):
    def forward(self, z):
        return torch.tanh(z / 3) * 3


def _conv(inner, outer, **options):
    return nn.Conv2d(inner, outer, 3, padding=1, **options)


def encoder():
    """Pixels (N, 3, 8H, 8W) in [0, 1] -> latents (N, 4, H, W)."""
    halved = [[_conv(64, 64, stride=2, bias=False), *(Block() for _ in range(3))] for _ in range(3)]
    return nn.Sequential(_conv(3, 64), Block(), *sum(halved, []), _conv(64, 4))


def decoder():
    """Latents (N, 4, H, W) -> pixels (N, 3, 8H, 8W), about [0, 1]."""
    doubled = [[*(Block() for _ in range(3)), nn.Upsample(scale_factor=2), _conv(64, 64, bias=False)]
               for _ in range(3)]
    return nn.Sequential(Bound(), _conv(4, 64), nn.ReLU(), *sum(doubled, []), Block(), _conv(64, 3))


# ------------------------------------------------------------------------------------------------
# Files.

def find(name):
    """"taesd", of the hub's cache or downloaded, or a folder -> {"encoder", "decoder": file}.

    Raises InputError where one is missing.
    """
    if name == "taesd":
        import huggingface_hub
        remedy = f"download {' and '.join(FILES.values())} of {HUB} elsewhere and pass --vae FOLDER"
        with reading("--vae taesd", remedy):
            return {part: pathlib.Path(huggingface_hub.hf_hub_download(HUB, file))
                    for part, file in FILES.items()}
    found = {part: pathlib.Path(name) / file for part, file in FILES.items()}
    for path in found.values():
        check(path.is_file(), f"{path}: no such file; a folder of TAESD has {' and '.join(FILES.values())}")
    return found


def load(path, part):
    """One of the files -> its network in eval mode. Raises InputError where it is of another network."""
    with reading(path, f"download it again, from {HUB}"):
        with utf8_path(path) as file, safe_open(file, "pt") as held:
            state = {key: held.get_tensor(key).float() for key in held.keys()}
    network = {"encoder": encoder, "decoder": decoder}[part]()
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        odd = " ".join(str(error).splitlines()[1].split())[:100]
        raise InputError(f"{path}: not TAESD's {part} ({odd}); are the two files swapped?") from error
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class TAESD:
    """The encoder on a device; its interface is that of vae.KL. Raises InputError as find and load."""

    batch, space = 64, "sd"  # batch: decoded at once
    factor, channels, scale = 8, 4, 1.0

    def __init__(self, name, device):
        self.name, self.device, files = str(name), device, find(name)
        hashes = "".join(sha256(files[part]) for part in FILES)
        self.sha256 = hashlib.sha256(hashes.encode()).hexdigest()
        self.encoder, self.decoder = (load(files[part], part).to(device) for part in FILES)

    @torch.inference_mode()
    def encode(self, pixels, noise=None):
        """Pixels (N, 3, 8H, 8W) in [-1, 1] -> scaled latents (N, 4, H, W); noise is drawn and not used, as a
        posterior would.
        """
        z = self.encoder((pixels.to(self.device) + 1) / 2)
        if noise is not None:
            noise(z.shape[1:])
        return z

    def store(self, pixels):
        """Pixels (N, 3, 8H, 8W) -> the mean and a log-std of LOG_STD, float16 (N, 2, 4, H, W), numpy."""
        mean = self.encode(pixels)
        return torch.stack([mean, torch.full_like(mean, LOG_STD)], 1).half().cpu().numpy()

    @torch.inference_mode()
    def decode(self, latents, precision="fp32"):
        """Scaled latents (N, 4, H, W) -> pixels (N, 3, 8H, 8W) in [-1, 1], fp32."""
        with autocast(self.device, precision):
            parts = [self.decoder(part).float() for part in latents.split(self.batch)]
        return (torch.cat(parts) * 2 - 1).clamp(-1, 1)

    def round_trip(self, pixels):
        """Pixels (N, 3, 8H, 8W), encoded and decoded: the ceiling of any model."""
        return self.decode(self.encode(pixels))
