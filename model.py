"""The modality registry and the fused-token multi-modal diffusion transformer (MMGen, Sec. 3.2).

    python model.py --ckpt runs/mmgen/latest.pt --export demo/mmgen.pt             # EMA in bf16 without projector, for sharing
    python model.py --ckpt runs/mmgen/latest.pt --export-official 0600000.pt       # as MMGen's own code loads it

Letters: N batch, M modalities, C latent channels of one modality, H W latent size, T tokens, D width, p patch size.
Time as in the paper: t = 0 is noise, t = 1 is data; x_t = t * x0 + (1 - t) * eps, v = x0 - eps.
The network embeds the noise level 1 - t, so that the released weights fit.
"""
import argparse
import math
import pathlib
import pickle
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import ndimage
from torch.utils import checkpoint as activations
from torch.utils.flop_counter import FlopCounterMode

from distributed import InputError, run, whole_file
from weights import locate, to_official, translate


# ------------------------------------------------------------------------------------------------
# Modalities. Adding one is one row of MODALITIES.

def _colour_pixels(image):
    return image.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1


def _colour_image(pixels):
    return ((pixels.transpose(1, 2, 0) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


def _depth_pixels(disparity):
    low, high = disparity.min(), disparity.max()
    scaled = (disparity - low) / max(high - low, 1e-8) * 2 - 1
    return np.repeat(scaled[None].astype(np.float32), 3, 0)


def _depth_map(pixels):
    return (pixels.mean(0) + 1) / 2


def _depth_picture(disparity):
    return np.repeat((disparity.clip(0, 1) * 255).round().astype(np.uint8)[..., None], 3, 2)


def unit(vectors):
    """Vectors (..., 3) at length 1; zero stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)


def _normal_pixels(normal):
    return normal.astype(np.float32).transpose(2, 0, 1)


def _normal_map(pixels):
    return unit(pixels.transpose(1, 2, 0))


def _normal_picture(normal):
    return ((normal * 0.5 + 0.5) * 255).round().clip(0, 255).astype(np.uint8)


def canny(image, low=0.1, high=0.2, sigma=1.0):
    """Canny edges of uint8 (H, W, 3) -> uint8 (H, W, 3), white on black.

    Gaussian, Sobel gradient of the brightness in [0, 1], non-maximum suppression along it, hysteresis between the thresholds.
    """
    grey = ndimage.gaussian_filter(image.astype(np.float64).mean(2) / 255, sigma)
    dy, dx = (ndimage.sobel(grey, axis) for axis in (0, 1))
    strength, direction = np.hypot(dx, dy), np.round(np.arctan2(dy, dx) / (np.pi / 4)).astype(int) % 4
    padded, (H, W) = np.pad(strength, 1), strength.shape
    at = lambda y, x: padded[1 + y:H + 1 + y, 1 + x:W + 1 + x]
    peak = np.zeros((H, W), bool)
    for k, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):  # ahead and behind along the gradient; ties go ahead
        peak |= (direction == k) & (strength >= at(y, x)) & (strength > at(-y, -x))
    parts, count = ndimage.label(peak & (strength > low), np.ones((3, 3)))
    strong = np.isin(parts, np.unique(parts[peak & (strength > high)])) & (parts > 0)
    return np.repeat((strong * np.uint8(255))[..., None], 3, 2)


class Modality(NamedTuple):
    loss_weight: float      # in the velocity loss
    file: str               # how a data folder's images are read: "colour", "scalar" (8/16 bit or .npy), "vector", "flat" colours
    to_pixels: Callable     # the user's array (H, W[, 3]) -> float32 (3, H, W) in [-1, 1] for the VAE
    from_pixels: Callable   # and back: float32 (3, H, W) -> the user's array
    picture: Callable       # the user's array -> uint8 (H, W, 3) to look at
    keep_array: bool        # sample.py writes the float array (.npy) beside the picture
    meaning: str            # for meta.json
    derive: Callable = None # from uint8 RGB (H, W, 3), where no files are needed: the data's modalities do not include it by themselves


MODALITIES = {
    "rgb": Modality(1.0, "colour", _colour_pixels, _colour_image, np.asarray, False, "sRGB, 8 bit"),
    "depth": Modality(0.2, "scalar", _depth_pixels, _depth_map, _depth_picture, True,
                      "relative disparity in [0, 1], near = 1; affine-invariant, no unit"),
    "normal": Modality(0.1, "vector", _normal_pixels, _normal_map, _normal_picture, True,
                       "unit vectors, +x left, +y up, +z towards the viewer; picture = xyz * 0.5 + 0.5"),
    "seg": Modality(0.1, "flat", _colour_pixels, _colour_image, np.asarray, False, "flat colours, one per class or segment"),
    "canny": Modality(0.1, "colour", _colour_pixels, _colour_image, np.asarray, False, "Canny edges of the RGB, white on black", canny),
}


# ------------------------------------------------------------------------------------------------
# Layers. Module names follow DiT / SiT.

def modulate(x, shift, scale):
    """x (N, T, D), shift and scale (N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        N, T, D = x.shape
        qkv = self.qkv(x).reshape(N, T, 3, self.heads, D // self.heads)  # (N, T, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                             # each (N, heads, T, d)
        x = F.scaled_dot_product_attention(q, k, v)                      # (N, heads, T, d)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))             # (N, T, D)


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # (N, T, 4D) inside


class Block(nn.Module):
    """A SiT block: attention and MLP, each with adaLN-Zero."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)  # each (N, D)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))               # (N, T, D)
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))                # (N, T, D)
        return x


class Head(nn.Module):
    """One modality's adaLN final layer."""

    def __init__(self, width, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)        # (N, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, C*p*p)


class TimeEmbedder(nn.Module):
    """One shared MLP embeds each modality's noise level to D/2; a second one fuses the M embeddings to D."""

    def __init__(self, width, num_modalities):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width // 2))
        self.mlp_fused = nn.Sequential(nn.Linear(num_modalities * (width // 2), width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, level):                                           # (N, M) in [0, 1]
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=level.device) / 128)
        angle = level[..., None].float() * frequencies                  # (N, M, 128)
        embedding = torch.cat([angle.cos(), angle.sin()], dim=-1)       # (N, M, 256)
        return self.mlp_fused(self.mlp(embedding).flatten(1))           # (N, D)


# Fusion: how the latents of M modalities become tokens, and which tokens each head reads.

class LinearFusion(nn.Module):
    """The patches of all modalities at one place become one token: T does not grow with M (as released)."""

    def __init__(self, num_modalities, channels, patch, width):
        super().__init__()
        self.num_modalities = num_modalities
        self.proj = nn.Conv2d(num_modalities * channels, width, patch, patch)

    def forward(self, x, position):                           # (N, M*C, H, W), (1, T, D)
        return self.proj(x).flatten(2).transpose(1, 2) + position  # (N, T, D)

    def split(self, tokens):
        """Tokens (N, T, D) -> what each of the M heads reads: here all the same."""
        return [tokens] * self.num_modalities


class MlpFusion(LinearFusion):
    """The ablation: two layers instead of one."""

    def __init__(self, num_modalities, channels, patch, width):
        super().__init__(num_modalities, channels, patch, width)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, width))

    def forward(self, x, position):
        tokens = self.proj(x).flatten(2).transpose(1, 2)  # (N, T, D)
        return self.mlp(tokens) + position                # (N, T, D)


class SequenceFusion(nn.Module):
    """Every modality keeps tokens of its own, M*T in all: the cost comparison of the supplement's Fig. 1(b)."""

    def __init__(self, num_modalities, channels, patch, width):
        super().__init__()
        self.num_modalities = num_modalities
        self.proj = nn.ModuleList(nn.Conv2d(channels, width, patch, patch) for _ in range(num_modalities))
        self.modality = nn.Parameter(torch.randn(num_modalities, width) * 0.02)

    def forward(self, x, position):
        parts = [proj(part).flatten(2).transpose(1, 2) + position + row                                # (N, T, D)
                 for proj, part, row in zip(self.proj, x.chunk(self.num_modalities, 1), self.modality)]
        return torch.cat(parts, 1)                                                                     # (N, M*T, D)

    def split(self, tokens):
        return tokens.chunk(self.num_modalities, 1)


FUSIONS = {"linear": LinearFusion, "mlp": MlpFusion, "sequence": SequenceFusion}


def sincos_positions(width, h, w):
    """DiT's fixed 2-d table: (h*w, width), the first half for the column, the second for the row."""
    omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], 1)


# ------------------------------------------------------------------------------------------------

class MMDiT(nn.Module):
    """The MMGen transformer: velocities of all modalities from their noisy latents."""

    def __init__(self, depth, width, heads, encoder_depth, modalities, num_classes, latent_channels, latent_size,
                 patch_size=2, fusion="linear", task_embedding=True, projector=True, z_dim=768):
        super().__init__()
        M = len(modalities)
        self.modalities, self.num_classes, self.latent_channels = tuple(modalities), num_classes, latent_channels
        self.latent_size, self.patch_size, self.encoder_depth = tuple(latent_size), patch_size, encoder_depth
        self.conditions = tuple(range(M))  # the modalities that may be given
        self.checkpointing = False         # train.py --checkpointing
        self.x_embedder = FUSIONS[fusion](M, latent_channels, patch_size, width)
        self.t_embedder = TimeEmbedder(width, M)
        self.task_embedder = nn.Embedding(M + 1, width) if task_embedding else None
        self.y_embedder = nn.Embedding(num_classes + 1, width)
        self.grid = (self.latent_size[0] // patch_size, self.latent_size[1] // patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.heads = nn.ModuleList(Head(width, latent_channels * patch_size ** 2) for _ in modalities)
        self.projector = nn.Sequential(nn.Linear(width, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(),
                                       nn.Linear(2048, z_dim)) if projector else None
        self._initialise(width)

    def _initialise(self, width):
        """DiT's initialisation: Xavier linears, adaLN and output layers zero, so that the first output is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for layer in (*self.t_embedder.mlp[::2], *self.t_embedder.mlp_fused[::2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in [b.adaLN_modulation[1] for b in self.blocks] + [m for h in self.heads for m in (h.adaLN_modulation[1], h.linear)]:
            nn.init.zeros_(layer.weight)
        self.pos_embed.data.copy_(torch.from_numpy(sincos_positions(width, *self.grid)))

    def _positions(self, h, w):
        """The position table for h x w tokens: (1, h*w, D)."""
        if (h, w) == self.grid:
            return self.pos_embed
        table = self.pos_embed.unflatten(1, self.grid).permute(0, 3, 1, 2)
        return F.interpolate(table, (h, w), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)

    def forward(self, x, t, y, given):
        """x (N, M*C, H, W), t (N, M), y (N,) long, given (N, M) bool -> v like x, z (N, T, z_dim) or None.

        t      time of each modality, 0 noise, 1 data
        y      class; num_classes is the null class of classifier-free guidance
        given  which modalities are conditions: selects the task embedding (Sec. 3.2), row 0 when none is
        z      REPA's projected hidden state after block encoder_depth, None without a projector
        H and W may differ from the training size: the position table is then interpolated.
        """
        N, _, H, W = x.shape
        p, C = self.patch_size, self.latent_channels
        h, w = H // p, W // p
        c = self.t_embedder(1 - t) + self.y_embedder(y)                             # (N, D)
        if self.task_embedder is not None:
            rows = torch.cat([~given.any(1, keepdim=True), given], 1)               # (N, M+1)
            c = c + rows.to(c.dtype) @ self.task_embedder.weight.to(c.dtype)        # (N, D)
        x = self.x_embedder(x, self._positions(h, w))                               # (N, T, D)
        z = None
        for i, block in enumerate(self.blocks, 1):
            x = activations.checkpoint(block, x, c, use_reentrant=False) if self.checkpointing and self.training else block(x, c)  # (N, T, D)
            if i == self.encoder_depth and self.projector is not None:
                z = self.projector(x[:, :h * w])                                    # (N, T, z_dim)
        v = torch.stack([head(part, c) for head, part in zip(self.heads, self.x_embedder.split(x))], 1)  # (N, M, T, C*p*p)
        v = v.reshape(N, -1, h, w, p, p, C).permute(0, 1, 6, 2, 4, 3, 5)            # (N, M, C, h, p, w, p)
        return v.reshape(N, -1, H, W), z                                            # (N, M*C, H, W)


# ------------------------------------------------------------------------------------------------
# Sizes, construction, files.

SIZES = {  # name: depth, width, heads, REPA depth
    "XL/2": (28, 1152, 16, 8),
    "L/2": (24, 1024, 16, 8),
    "B/2": (12, 768, 12, 8),
    "S/2": (12, 384, 6, 8),
    "T/2": (8, 192, 3, 4),
}
FORMAT = "mmgen-1"


def build_model(name, modalities=("rgb", "depth", "normal", "seg"), num_classes=1000, latent_channels=4, latent_size=32,
                encoder_depth=None, **options):
    """A freshly initialised MMDiT; name is a row of SIZES, latent_size an int or (H, W).

    options: patch_size, fusion ("linear" | "mlp" | "sequence"), task_embedding, projector, z_dim.
    The arguments are kept in model.config, from which a checkpoint rebuilds the model.
    Raises InputError for an unknown size, modality or fusion, or a latent size that patches do not tile.
    """
    unknown = [m for m in modalities if m not in MODALITIES]
    if name not in SIZES or unknown:
        raise InputError(f"--model {name}: choose one of {', '.join(SIZES)}" if name not in SIZES
                         else f"modality {unknown[0]!r} is not in the registry: {', '.join(MODALITIES)}")
    if options.get("fusion", "linear") not in FUSIONS:
        raise InputError(f"--fusion {options['fusion']}: choose one of {', '.join(FUSIONS)}")
    size = (latent_size, latent_size) if isinstance(latent_size, int) else tuple(latent_size)
    if any(s % options.get("patch_size", 2) for s in size):
        raise InputError(f"latent size {size[0]}x{size[1]} is not a multiple of the patch size {options.get('patch_size', 2)}")
    depth, width, heads, default_depth = SIZES[name]
    model = MMDiT(depth, width, heads, encoder_depth or default_depth, modalities, num_classes, latent_channels, size, **options)
    model.config = dict(name=name, modalities=list(modalities), num_classes=num_classes, latent_channels=latent_channels,
                        latent_size=list(size), encoder_depth=encoder_depth or default_depth, **options)
    return model


def training_flops(**config):
    """Floating-point operations of one sample's forward and backward pass, counted without a device; config as of build_model."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_model(**config)
        M, C, (H, W) = len(model.modalities), model.latent_channels, model.latent_size
        v, z = model(torch.zeros(1, M * C, H, W), torch.zeros(1, M), torch.zeros(1, dtype=torch.long), torch.zeros(1, M, dtype=torch.bool))
        (v.sum() + (0 if z is None else z.sum())).backward()
    return counter.get_total_flops()


def load_checkpoint(path):
    """A checkpoint, memory-mapped: {model, ema, opt, step, config, format}; released weights without model and opt.

    path: a file of this project, of MMGen, REPA or SiT, a run folder, or hf:owner/repository/file.
    Raises InputError when the file is missing, cut short, holds pickled objects, or is something else.
    """
    path = locate(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; train one with train.py or leave out --ckpt for the bundled demo")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the released files keep their arguments in one
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # what weights_only=True raises
        raise InputError(f"{path}: refused, it holds pickled Python objects or is no torch file; only tensors and plain containers are read")
    except (RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, OSError):
        raise InputError(f"{path}: not a readable checkpoint ({path.stat().st_size} bytes), it may be cut short; use another of its folder")
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        return translate(checkpoint, path)
    config = checkpoint.get("config")
    whole = isinstance(config, dict) and all(isinstance(config.get(part), dict) for part in ("model", "meta", "train"))
    lost = [key for key in ("vae", "vae_sha256", "scale", "latent_channels", "latent_size", "resolution", "class_names", "palette")
            if not whole or key not in config["meta"]]
    states = [checkpoint.get(part, {}) for part in ("ema", "model")]
    tensors = all(isinstance(state, dict) and all(isinstance(v, torch.Tensor) for v in state.values()) for state in states)
    if lost or not tensors or not checkpoint.get("ema") or not isinstance(checkpoint.get("step"), int):
        raise InputError(f"{path}: incomplete ({'config ' + lost[0] if lost else 'ema, model or step'} is missing or wrong); use another of its folder")
    return checkpoint


def load_weights(model, state, path, assign=False):
    """model.load_state_dict with every mismatch in one readable error; the projector may be missing or too much."""
    mine = model.state_dict()
    for key in sorted(mine.keys() | state.keys()):
        if key not in state and not key.startswith("projector."):
            raise InputError(f"{path}: the weight {key} {tuple(mine[key].shape)} is missing")
        if key not in mine and not key.startswith("projector."):
            raise InputError(f"{path}: the weight {key} {tuple(state[key].shape)} does not belong to this model")
        if key in mine and key in state and mine[key].shape != state[key].shape:
            raise InputError(f"{path}: {key} is {tuple(state[key].shape)}, this model needs {tuple(mine[key].shape)}")
    model.load_state_dict(state, strict=False, assign=assign)


def load_model(path, ema=True, device="cpu", build=build_model):
    """The model of a checkpoint for sampling, in fp32 and eval mode, without the projector.

    fp32 weights stay in the mapped file until they are used or moved to a device: nothing else of it is read.

    model.meta is the cache's meta.json that it was trained on (VAE, scale, classes, palette, ...).
    Raises InputError as load_checkpoint does.
    """
    checkpoint = load_checkpoint(path)
    weights = "ema" if ema else "model"
    if weights not in checkpoint:
        raise InputError(f"{path}: has no {weights} weights, it was exported with the EMA alone")
    try:
        with torch.device("meta"):  # no memory, no initialisation
            model = build(**{**checkpoint["config"]["model"], "projector": False})
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: its model configuration {checkpoint['config']['model']} is not of this version ({error})")
    state = {k: v.float() for k, v in checkpoint[weights].items() if not k.startswith("projector.")}
    load_weights(model, state, path, assign=True)
    model.meta, model.step = checkpoint["config"]["meta"], checkpoint["step"]
    return model.to(device).eval().requires_grad_(False)


def main():
    """Export a checkpoint's EMA, in our format or in the released one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--export", type=pathlib.Path, help="write the EMA in bf16, without projector and optimiser")
    what.add_argument("--export-official", type=pathlib.Path, metavar="FILE", help="write the EMA as MMGen's own code loads it")
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.ckpt)
    if args.export:
        ema = {k: v.to(torch.bfloat16) for k, v in checkpoint["ema"].items() if not k.startswith("projector.")}
        out = {"ema": ema, "step": checkpoint["step"], "config": checkpoint["config"], "format": FORMAT}
    else:
        out = to_official(checkpoint, args.ckpt)
    path = args.export or args.export_official
    with whole_file(path) as file:
        torch.save(out, file)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
