"""The fused-token multi-modal diffusion transformer (MMGen, Sec. 3.2).

Letters: N batch, M modalities, C latent channels of one modality, H W latent size, T tokens, D width, p
patch. Time as in the paper: t = 0 is noise, t = 1 is data; x_t = t * x0 + (1 - t) * eps, v = x0 - eps. The
network embeds the noise level 1 - t, so that the released weights fit.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.flop_counter import FlopCounterMode

from layers import BLOCKS, Head, TimeEmbedder, rotation_of


# ------------------------------------------------------------------------------------------------
# Fusion: how the latents of M modalities become tokens, and which tokens each head reads.

class Fusion(nn.Module):
    """Which of its weights belong to which modality --init sees for itself, by transfer.parts_of: blocks of
    equal size along one dimension, or entries of a list, in the modalities' order. What depends on their
    number otherwise starts anew where the file has others.
    """

    def __init__(self, num_modalities):
        super().__init__()
        self.num_modalities = num_modalities

    def initialise(self):
        """Called when all linear layers and convolutions have been drawn anew: what shall be otherwise."""


class LinearFusion(Fusion):
    """The patches of all modalities at one place become one token: T does not grow with M (as released)."""

    def __init__(self, num_modalities, channels, patch, width):
        super().__init__(num_modalities)
        self.proj = nn.Conv2d(num_modalities * channels, width, patch, patch)

    def forward(self, x, position):                                # (N, M*C, H, W), (1, T, D)
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


class SequenceFusion(Fusion):
    """Every modality keeps tokens of its own, M*T in all: the supplement's Fig. 1(b), for its cost."""

    def __init__(self, num_modalities, channels, patch, width):
        super().__init__(num_modalities)
        self.proj = nn.ModuleList(nn.Conv2d(channels, width, patch, patch) for _ in range(num_modalities))
        self.modality = nn.Parameter(torch.randn(num_modalities, width) * 0.02)

    def forward(self, x, position):
        parts = []
        for proj, part, row in zip(self.proj, x.chunk(self.num_modalities, 1), self.modality):
            tokens = proj(part).flatten(2).transpose(1, 2)  # (N, T, D)
            parts.append(tokens + position + row)           # (N, T, D)
        return torch.cat(parts, 1)                          # (N, M*T, D)

    def split(self, tokens):
        return tokens.chunk(self.num_modalities, 1)


FUSIONS = {"linear": LinearFusion, "mlp": MlpFusion, "sequence": SequenceFusion}


def sincos_positions(width, h, w):
    """DiT's fixed 2-d table: (h*w, width) float64, the first half for the column, the second for the row."""
    quarter = torch.arange(width // 4, dtype=torch.float64)
    omega = 1.0 / 10000 ** (quarter / (width / 4))
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


# ------------------------------------------------------------------------------------------------
# REPA's projectors, of the hidden state after block encoder_depth.

FEATURES = 768  # numbers of a target: DINOv2-B's


def mlp_projector(width):
    return nn.Sequential(nn.Linear(width, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(),
                         nn.Linear(2048, FEATURES))


def conv_projector(width):
    """iREPA's (Singh et al., 2025): what is aligned is the arrangement of the tokens."""
    return nn.Conv2d(width, FEATURES, 3, padding=1)


PROJECTORS = {"mlp": mlp_projector, "conv": conv_projector}


# ------------------------------------------------------------------------------------------------

class MMDiT(nn.Module):
    """The MMGen transformer: velocities of all modalities from their noisy latents."""

    def __init__(self, depth, width, heads, encoder_depth, modalities, num_classes, latent_channels,
                 latent_size, patch_size=2, fusion="linear", fused_time=True, task_embedding=True,
                 projector=True, blocks="sit", projector_kind="mlp", middle_heads=False):
        super().__init__()
        M = len(modalities)
        self.modalities = tuple(modalities)
        self.num_classes = num_classes
        self.latent_channels = latent_channels
        self.latent_size = tuple(latent_size)
        self.patch_size = patch_size
        self.encoder_depth = encoder_depth
        self.checkpointing = False  # recompute the blocks in the backward pass
        self.x_embedder = FUSIONS[fusion](M, latent_channels, patch_size, width)
        self.t_embedder = TimeEmbedder(width, M, fused_time)
        self.task_embedder = nn.Embedding(M + 1, width) if task_embedding else None
        self.y_embedder = nn.Embedding(num_classes + 1, width)
        self.grid = tuple(s // patch_size for s in self.latent_size)
        positions = torch.zeros(1, self.grid[0] * self.grid[1], width)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(BLOCKS[blocks](width, heads) for _ in range(depth))
        outputs = latent_channels * patch_size ** 2
        self.heads = nn.ModuleList(Head(width, outputs) for _ in modalities)
        self.projector = PROJECTORS[projector_kind](width) if projector else None
        self.middle_heads = None  # internal guidance: velocities of the state after block encoder_depth
        if middle_heads:
            self.middle_heads = nn.ModuleList(Head(width, outputs) for _ in modalities)
        self._initialise(width)

    def _initialise(self, width):
        """The released one: Xavier linears, the time MLP and the classes N(0, 0.02), the tasks N(0, 1) as
        torch draws them, adaLN and output layers zero, so that the first output is 0.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.x_embedder.initialise()
        for layer in (*self.t_embedder.mlp[::2], self.y_embedder):
            nn.init.normal_(layer.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        for head in (*self.heads, *(self.middle_heads or ())):
            nn.init.zeros_(head.adaLN_modulation[1].weight)
            nn.init.zeros_(head.linear.weight)
        self.pos_embed.data.copy_(sincos_positions(width, *self.grid))

    def positions(self, h, w):
        """The position table for h x w tokens: (1, h*w, D)."""
        if (h, w) == self.grid:
            return self.pos_embed
        table = self.pos_embed.unflatten(1, self.grid).permute(0, 3, 1, 2)
        return F.interpolate(table, (h, w), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)

    def rotations(self, x, h, w):
        """What rotary blocks take beside the tokens x: their rotation table; () for the others."""
        block = self.blocks[0]
        if not block.rotary:
            return ()
        d = x.shape[2] // block.attn.heads
        return (rotation_of(h, w, x.shape[1] // (h * w), d, x.device),)

    def project(self, tokens, h, w):
        """The features (N, h*w, 768) of tokens (N, h*w, D); a convolution sees the tokens as a map."""
        if not isinstance(self.projector, nn.Conv2d):
            return self.projector(tokens)
        return self.projector(tokens.mT.unflatten(2, (h, w))).flatten(2).mT

    def velocity(self, heads, tokens, c, h, w):
        """A head's patches of each modality, laid out as latents (N, M*C, H, W)."""
        p, C = self.patch_size, self.latent_channels
        parts = [head(part, c) for head, part in zip(heads, self.x_embedder.split(tokens))]
        v = torch.stack(parts, 1)                                              # (N, M, T, C*p*p)
        v = v.reshape(len(v), -1, h, w, p, p, C).permute(0, 1, 6, 2, 4, 3, 5)  # (N, M, C, h, p, w, p)
        return v.reshape(len(v), -1, h * p, w * p)                             # (N, M*C, H, W)

    def forward(self, x, t, y, given, middle=False):
        """x (N, M*C, H, W), t (N, M), y (N,) long, given (N, M) bool -> v like x, z (N, T, 768) or None;
        with middle also v_mid, the velocity by the middle heads, like x.

        t      time of each modality, 0 noise, 1 data
        y      class; num_classes is the null class of classifier-free guidance
        given  which modalities are conditions: selects the task embedding (Sec. 3.2), row 0 when none is
        z      REPA's projected hidden state after block encoder_depth, None without a projector
        H and W may differ from the training size: the position table is then interpolated.
        """
        h, w = (side // self.patch_size for side in x.shape[2:])
        c = self.t_embedder(1 - t) + self.y_embedder(y)                             # (N, D)
        if self.task_embedder is not None:
            rows = torch.cat([~given.any(1, keepdim=True), given], 1)               # (N, M+1)
            c = c + rows.to(c.dtype) @ self.task_embedder.weight.to(c.dtype)        # (N, D)
        # compiled for AVX-512, a block reads transposed tokens wrongly in bf16 (torch 2.11 to 2.14)
        x = self.x_embedder(x, self.positions(h, w)).contiguous()                   # (N, T, D)
        z = v_mid = None
        more = (c, *self.rotations(x, h, w))                                            # (N, D), (2, T, d/2)
        for i, block in enumerate(self.blocks, 1):
            if self.checkpointing and self.training:
                x = recompute(block, x, *more, use_reentrant=False)                 # (N, T, D)
            else:
                x = block(x, *more)                                                 # (N, T, D)
            if i == self.encoder_depth and self.projector is not None:
                z = self.project(x[:, :h * w], h, w)                                # (N, T, 768)
            if i == self.encoder_depth and middle:
                v_mid = self.velocity(self.middle_heads, x, c, h, w)                # (N, M*C, H, W)
        v = self.velocity(self.heads, x, c, h, w)                                   # (N, M*C, H, W)
        return (v, z, v_mid) if middle else (v, z)


# ------------------------------------------------------------------------------------------------
# Sizes and construction.

SIZES = {  # name: depth, width, heads, REPA depth
    "XL/2": (28, 1152, 16, 8),
    "L/2": (24, 1024, 16, 8),
    "B/2": (12, 768, 12, 8),
    "S/2": (12, 384, 6, 8),
    "T/2": (8, 192, 3, 4),
}


def build_model(name, modalities=("rgb", "depth", "normal", "seg"), num_classes=1000, latent_channels=4,
                latent_size=32, encoder_depth=None, **options):
    """A freshly initialised MMDiT; name is a row of SIZES, latent_size an int or (H, W).

    options: patch_size, fusion (a row of FUSIONS), fused_time, task_embedding, projector, blocks (a
    row of layers.BLOCKS), projector_kind (of PROJECTORS), middle_heads.
    The arguments are kept in model.config, from which a checkpoint rebuilds the model.
    Raises KeyError for an unknown size or row, ValueError for a latent size that patches do not tile.
    """
    size = [latent_size] * 2 if isinstance(latent_size, int) else list(latent_size)
    patch = options.get("patch_size", 2)
    if any(s % patch for s in size):
        raise ValueError(f"latent size {size[0]}x{size[1]} is not a multiple of the patch size {patch}")
    depth, width, heads, default_depth = SIZES[name]
    encoder_depth = encoder_depth or default_depth
    rest = dict(modalities=list(modalities), num_classes=num_classes, latent_channels=latent_channels,
                latent_size=size, encoder_depth=encoder_depth, **options)
    model = MMDiT(depth, width, heads, **rest)
    model.config = dict(name=name, **rest)
    return model


def training_flops(config):
    """Operations of a sample's forward and backward pass, counted without a device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_model(**config)
        M, C = len(model.modalities), model.latent_channels
        x, t = torch.zeros(1, M * C, *model.latent_size), torch.zeros(1, M)
        y, middle = torch.zeros(1, dtype=torch.long), model.middle_heads is not None
        outputs = model(x, t, y, t > 0, middle=middle)
        sum(each.sum() for each in outputs if each is not None).backward()
    return counter.get_total_flops()
