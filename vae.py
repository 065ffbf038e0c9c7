"""Encoders: pixels -> what a cache stores -> latents -> pixels.

The Stable Diffusion autoencoder (KL-f8) in plain torch, the toy one in a small configuration, TAESD, a tiny
one of Stable Diffusion's latents, and Pixels, which leaves pixels as they are. Module names are those of the
released files (stabilityai/sd-vae-ft-mse, -ema; madebyollin/taesd), which load with strict=True. Latents are
scaled to about unit variance everywhere but inside of AutoencoderKL.
"""
import hashlib
import json
import pathlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

from distributed import InputError, autocast, bare, check, reading, say, sha256, utf8_path

SD_CONFIG = dict(channels=(128, 256, 512, 512), layers=2, groups=32, latent_channels=4, scale=0.18215)
TOY_CONFIG = dict(channels=(32, 64, 64), layers=1, groups=8, latent_channels=4, scale=1.0)
RELEASED = {"sd-mse": "stabilityai/sd-vae-ft-mse", "sd-ema": "stabilityai/sd-vae-ft-ema"}
TAESD = {"taesd": "madebyollin/taesd"}
TAESD_FILES = ("taesd_encoder.safetensors", "taesd_decoder.safetensors")
SD_SPACE = "sd"  # Stable Diffusion's latents times its scale, which its autoencoders and TAESD share
BUNDLED = pathlib.Path(__file__).parent / "demo" / "vae.safetensors"


# ------------------------------------------------------------------------------------------------
# The network.

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
        q, k, v = (layer(h)[:, None] for layer in (self.to_q, self.to_k, self.to_v))     # each (N, 1, HW, c)
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])                # (N, HW, c)
        return x + h.transpose(1, 2).reshape(x.shape)                                    # (N, c, H, W)


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
        widths = [inner] + [outer] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(width, outer, groups) for width in widths)
        if resampler is not None:
            self.add_module(name, nn.ModuleList([resampler(outer)]))

    def forward(self, x):
        for part in self.children():
            for layer in part:
                x = layer(x)
        return x


def _stages(channels, layers, groups, name, resampler):
    """One Stage for each of the channels, resampled but for the last."""
    inner, last = [channels[0], *channels[:-1]], len(channels) - 1
    return nn.ModuleList(Stage(inner[i], channels[i], layers, groups, name, resampler if i < last else None)
                         for i in range(len(channels)))


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
        self.down_blocks = _stages(channels, layers, groups, "downsamplers", Downsample)
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
        self.up_blocks = _stages(channels, layers + 1, groups, "upsamplers", Upsample)
        self.mid_block = Middle(channels[0], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z):                                    # (N, C, H, W)
        x = self.mid_block(self.conv_in(z))                  # (N, channels[0], H, W)
        for stage in self.up_blocks:
            x = stage(x)
        with torch.autocast(z.device.type, enabled=False):  # pixels in fp32: depth has more than 8 bits
            return self.conv_out(F.silu(self.conv_norm_out(x.float())))  # (N, 3, fH, fW)


class AutoencoderKL(nn.Module):
    """KL-regularised autoencoder; factor = 2 ** (stages - 1) pixels per latent."""

    def __init__(self, channels, layers, groups, latent_channels, scale):
        super().__init__()
        self.config = dict(channels=list(channels), layers=layers, groups=groups,
                           latent_channels=latent_channels, scale=scale)
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


# ------------------------------------------------------------------------------------------------
# TAESD. The numbers of its layers are the names of the released weights.

TAESD_WIDTH, TAESD_CHANNELS, TAESD_STAGES = 64, 4, 3


def _tiny_conv(inner=TAESD_WIDTH, outer=TAESD_WIDTH, **options):
    return nn.Conv2d(inner, outer, 3, padding=1, **options)


class TinyClamp(nn.Module):
    def forward(self, z):
        return 3 * torch.tanh(z / 3)


class TinyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        first, second, third = (_tiny_conv() for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x):                # (N, 64, H, W)
        return F.relu(self.conv(x) + x)  # (N, 64, H, W)


class TinyDecoder(nn.Sequential):
    def forward(self, z):                                   # (N, C, H, W)
        *layers, last = self
        for layer in layers:
            z = layer(z)
        with torch.autocast(z.device.type, enabled=False):  # pixels in fp32, as of Decoder
            return last(z.float())                          # (N, 3, 8H, 8W)


class TinyAutoencoder(nn.Module):
    """TAESD (github.com/madebyollin/taesd): deterministic, between pixels and scaled SD latents."""

    scale, latent_channels, factor = 1.0, TAESD_CHANNELS, 2 ** TAESD_STAGES

    def __init__(self):
        super().__init__()
        layers = [_tiny_conv(inner=3), TinyBlock()]
        for _ in range(TAESD_STAGES):
            layers += [_tiny_conv(stride=2, bias=False), *(TinyBlock() for _ in range(3))]
        self.encoder = nn.Sequential(*layers, _tiny_conv(outer=TAESD_CHANNELS))
        layers = [TinyClamp(), _tiny_conv(inner=TAESD_CHANNELS), nn.ReLU()]
        for _ in range(TAESD_STAGES):
            layers += [*(TinyBlock() for _ in range(3)), nn.Upsample(scale_factor=2), _tiny_conv(bias=False)]
        self.decoder = TinyDecoder(*layers, TinyBlock(), _tiny_conv(outer=3))

    def encode(self, x):
        """Pixels (N, 3, 8H, 8W) in [-1, 1] -> mean, logvar, each (N, C, H, W), scaled; logvar is the floor of
        AutoencoderKL's.
        """
        mean = self.encoder((x + 1) / 2)
        return mean, torch.full_like(mean, -30)

    def decode(self, z):
        """Scaled latents (N, C, H, W) -> pixels (N, 3, 8H, 8W), about [-1, 1]."""
        return self.decoder(z) * 2 - 1


# ------------------------------------------------------------------------------------------------
# Files.

def find_vae(name):
    """The file of "toy" (bundled), "sd-mse" / "sd-ema" (the hub's cache, else downloaded) or a path."""
    if name == "toy":
        return BUNDLED
    if name not in RELEASED:
        return pathlib.Path(name)
    file = "diffusion_pytorch_model.safetensors"
    remedy = f"download {file} of {RELEASED[name]} elsewhere and pass --vae FILE, or use --vae toy"
    return _of_hub(name, RELEASED[name], file, remedy)


def _of_hub(name, repository, file, remedy):
    """A file of a repository: the hub's cache's, else downloaded -> Path. Raises InputError with the remedy
    where it cannot be had.
    """
    import huggingface_hub
    with reading(f"--vae {name}", remedy):
        return pathlib.Path(huggingface_hub.hf_hub_download(repository, file))


def _modern(state):
    """A state dict with today's names of the attention; older files have query, key, value, proj_attn."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    out = {}
    for key, tensor in state.items():
        before, attention, rest = key.partition(".mid_block.attentions.0.")
        old, _, kind = rest.rpartition(".")
        if attention and old in names:
            key = f"{before}{attention}{names[old]}.{kind}"
            tensor = tensor[..., 0, 0] if tensor.dim() == 4 else tensor
        out[key] = tensor
    return out


def _scale_beside(path):
    """The scaling factor that diffusers' config.json beside a file says; SD's where there is none.

    Raises InputError where it is of another network, or its latents are shifted too.
    """
    file, usual = path.with_name("config.json"), SD_CONFIG["scale"]
    if not file.is_file():
        return usual
    with reading(file, "mend it, or move it away"):
        said = dict(json.loads(file.read_text()))
    kind, shift = said.get("_class_name", "AutoencoderKL"), said.get("shift_factor")
    check(kind == "AutoencoderKL", f"{file}: _class_name is {kind!r}, expected 'AutoencoderKL'; pass an "
          "autoencoder of Stable Diffusion")
    check(not shift, f"{file}: shift_factor is {shift}, expected none; pass an autoencoder of "
          "Stable Diffusion")
    scale = said.get("scaling_factor", usual)
    check(isinstance(scale, (int, float)) and 0 < scale < 1e6,
          f"{file}: scaling_factor is {scale!r}, expected a number above 0; mend it, or move it away")
    if scale != usual:
        say(f"{path}: scaling factor {scale}, of its config.json")
    return scale


def load_vae(name_or_path):
    """An AutoencoderKL in eval mode from "toy", "sd-mse", "sd-ema" or a safetensors file.

    A file without our configuration in its metadata is taken for the released SD configuration, with the
    scaling factor of a config.json beside it. Raises InputError when the file is missing, unreadable or of
    another shape.
    """
    path = find_vae(name_or_path)
    check(path.is_file(), f"--vae {name_or_path}: no such file; give a .safetensors file, "
          f"{', '.join(RELEASED)} or toy")
    with reading(f"--vae {path}", "download or train it again"):
        with utf8_path(path) as name, safe_open(name, "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "null"))
            state = {key: file.get_tensor(key).float() for key in file.keys()}
        vae = AutoencoderKL(**(config or {**SD_CONFIG, "scale": _scale_beside(path)}))
    try:
        vae.load_state_dict(_modern(bare(state)), strict=True)
    except RuntimeError as error:
        odd = str(error).splitlines()[1].strip()
        raise InputError(f"--vae {path}: {odd}; not an SD or toy VAE") from error
    vae.path = path
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def find_taesd(name):
    """TAESD's two files, encoder and decoder: those of a folder, of "taesd" the hub's (else downloaded).

    Raises InputError where one is missing.
    """
    both = " and ".join(TAESD_FILES)
    if name in TAESD:
        remedy = f"download {both} of {TAESD[name]} elsewhere and pass --vae FOLDER, or use --vae toy"
        return [_of_hub(name, TAESD[name], file, remedy) for file in TAESD_FILES]
    paths = [pathlib.Path(name, file) for file in TAESD_FILES]
    for path in paths:
        check(path.is_file(), f"--vae {name}: has no {path.name}; a folder must hold TAESD's {both}, any "
              "other autoencoder is a .safetensors file")
    return paths


def _shapes(network):
    return {key: list(value.shape) for key, value in network.state_dict().items()}


def load_taesd(name):
    """A TinyAutoencoder in eval mode from "taesd" or a folder with its two files.

    Raises InputError where a file is missing, unreadable, of another shape, or under the other's name.
    """
    paths, tiny = find_taesd(name), TinyAutoencoder()
    halves = {"encoder": tiny.encoder, "decoder": tiny.decoder}
    for path, (half, other) in zip(paths, (("encoder", "decoder"), ("decoder", "encoder"))):
        wanted, again = _shapes(halves[half]), f"download {path.name} of {TAESD['taesd']} again"
        with reading(f"--vae {path}", again), utf8_path(path) as readable, safe_open(readable, "pt") as file:
            found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # before anything is read
            check(found != _shapes(halves[other]), f"--vae {path}: is TAESD's {other}, expected its {half}; "
                  "exchange the two files' names")
            for key in dict.fromkeys((*wanted, *found)):
                theirs, ours = found.get(key, "none"), wanted.get(key, "none")
                check(theirs == ours, f"--vae {path}: shape of {key[:80]} is {theirs}, expected {ours}; not "
                      f"TAESD's {half}, {again}")
            halves[half].load_state_dict({key: file.get_tensor(key).float() for key in wanted})
    tiny.paths = paths
    return tiny.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def timm_model(name, file, remedy, **options):
    """A timm model without its classifier in eval mode, its weights from a local file or, of None, the hub.

    Raises InputError with the remedy when the name is unknown or the weights cannot be had.
    """
    import timm
    overlay = dict(file=str(file)) if file else None
    with reading(file or f"the weights of {name}", remedy):
        model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay,
                                  **options)
    return model.eval()


# ------------------------------------------------------------------------------------------------
# Encoders. An encoder has name, sha256, factor (pixels a latent), channels, scale, and space: encoders of
# equal space speak the same scaled latents.

class Pixels:
    """No autoencoder: the latents are the pixels."""

    name, sha256, factor, channels, scale, space = "none", None, 1, 3, 1.0, "none"

    def store(self, pixels):
        """Pixels (N, 3, H, W) in [-1, 1] -> uint8 like it, numpy."""
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()

    def encode(self, pixels, noise=None):
        """Pixels (N, 3, H, W) -> latents: themselves."""
        return pixels

    def decode(self, latents, precision="fp32"):
        """Latents (N, 3, H, W) -> pixels in [-1, 1]."""
        return latents.clamp(-1, 1)

    def round_trip(self, pixels):
        """Pixels encoded and decoded: themselves."""
        return pixels


class KL:
    """An AutoencoderKL on a device."""

    batch = 64  # decoded at once

    def __init__(self, name, device):
        self.name, self.device = str(name), device
        self.vae = load_vae(name).to(device)
        self.sha256 = sha256(self.vae.path)
        self.factor, self.channels, self.scale = self.vae.factor, self.vae.latent_channels, self.vae.scale
        usual = {**SD_CONFIG, "channels": list(SD_CONFIG["channels"])}
        self.space = SD_SPACE if self.vae.config == usual else self.sha256

    @torch.inference_mode()
    def store(self, pixels):
        """Pixels (N, 3, fH, fW) -> the posterior's mean and log-std, float16 (N, 2, C, H, W), numpy."""
        mean, logvar = self.vae.encode(pixels.to(self.device))
        return torch.stack([mean, logvar / 2], 1).half().cpu().numpy()

    @torch.inference_mode()
    def encode(self, pixels, noise=None):
        """Pixels (N, 3, fH, fW) -> scaled latents (N, C, H, W): the mean, with noise(shape) a sample."""
        mean, logvar = self.vae.encode(pixels.to(self.device))
        if noise is not None:
            mean = mean + (logvar / 2).exp() * noise(mean.shape[1:])
        return mean * self.scale

    @torch.inference_mode()
    def decode(self, latents, precision="fp32"):
        """Scaled latents (N, C, H, W) -> pixels (N, 3, fH, fW) in [-1, 1], fp32."""
        with autocast(self.device, precision):
            parts = [self.vae.decode(part / self.scale).float() for part in latents.split(self.batch)]
        return torch.cat(parts).clamp(-1, 1)

    @torch.inference_mode()
    def round_trip(self, pixels):
        """Pixels (N, 3, fH, fW), encoded to the posterior's mean and decoded: the ceiling of any model."""
        return self.vae.decode(self.vae.encode(pixels.to(self.device))[0]).clamp(-1, 1)


class Tiny(KL):
    """TAESD on a device. It has no posterior: what KL takes for its mean is all there is."""

    space = SD_SPACE

    def __init__(self, name, device):
        self.name, self.device = str(name), device
        self.vae = load_taesd(name).to(device)
        self.sha256 = hashlib.sha256("".join(map(sha256, self.vae.paths)).encode()).hexdigest()
        self.factor, self.channels, self.scale = self.vae.factor, self.vae.latent_channels, self.vae.scale

    def encode(self, pixels, noise=None):
        """Pixels (N, 3, 8H, 8W) -> scaled latents (N, C, H, W); noise is not drawn from."""
        return super().encode(pixels)


def load_encoder(name, device):
    """The encoder "toy", "sd-mse", "sd-ema", "taesd", "none", of a file, or of TAESD's folder.

    InputError as of load_vae and load_taesd.
    """
    if name == "none":
        return Pixels()
    tiny = name in TAESD or pathlib.Path(name).is_dir()
    return Tiny(name, device) if tiny else KL(name, device)


def space_of(meta):
    """The space of a cache's or checkpoint's latents, by its meta.json: as of an encoder."""
    of_sd = meta["vae"] in (*RELEASED, *TAESD)  # older ones do not say their space
    return meta.get("space", SD_SPACE if of_sd else meta["vae_sha256"])


def is_of(encoder, meta):
    """Whether an encoder is the autoencoder of a cache or checkpoint, as far as its meta.json tells."""
    if meta["vae_sha256"] is None:  # pixels; released weights do not say
        return (encoder.name == "none") == (meta["vae"] == "none") and encoder.scale == meta["scale"]
    return encoder.sha256 == meta["vae_sha256"]


def signature_of(encoder, meta):
    """What a recipe says of the encoder that encoder_of gave: {vae, vae_sha256}.

    The training cache's, if this is its autoencoder, wherever the file lies now; else its own.
    """
    if is_of(encoder, meta):
        return dict(vae=meta["vae"], vae_sha256=meta["vae_sha256"])
    return dict(vae=encoder.name, vae_sha256=encoder.sha256)


def encoder_of(meta, device, name=None):
    """The encoder of a cache or checkpoint, from its meta.json's name or from `name`.

    Its scale is that of the cache's latents. A `name` of another autoencoder of Stable Diffusion's space
    stands in, with a scale of its own: good for sampling, where nothing is kept that both would write.
    Raises InputError where the file behind the name is any other autoencoder, or meta does not tell its file
    and it has another scale.
    """
    encoder = load_encoder(name or meta["vae"], device)
    if name and encoder.space == space_of(meta) == SD_SPACE and not is_of(encoder, meta):
        say(f"decoded by {encoder.name} in the place of {meta['vae']}, the training cache's: both speak "
            "Stable Diffusion's latents, their pixels differ")
        return encoder
    same = meta["vae_sha256"] in (None, encoder.sha256)  # None: released weights do not say
    check((encoder.name == "none") == (meta["vae"] == "none") and same,
          f"--vae {name or meta['vae']}: not the VAE of the training cache, which is {meta['vae']} "
          f"(sha256 {str(meta['vae_sha256'])[:12]}); pass that one")
    scale = meta["scale"]
    check(isinstance(scale, (int, float)) and scale > 0, f"scale of the training cache: {str(scale)[:40]}, "
          "expected a number above 0; make the cache again")
    check(meta["vae_sha256"] or encoder.scale == scale, f"--vae {name or meta['vae']}: its scaling factor is "
          f"{encoder.scale}, the model was trained with {scale}; pass that model's autoencoder")
    encoder.scale = scale  # a file is known by its content: its config.json may be lost
    return encoder


def latents(stored, normals, meta):
    """Rows of a cache -> (n, C, H, W): a posterior sample times the scale; uint8 pixels as they are.

    stored: a tensor of what an encoder's store returns; normals (n, C, H, W). Needs the cache's meta.json
    alone.
    """
    if stored.dtype == torch.uint8:
        return stored.float() / 127.5 - 1
    mean, log_std = stored.float().unbind(1)
    return (mean + log_std.exp() * normals) * meta["scale"]
