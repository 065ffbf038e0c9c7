"""The layers of the transformer. Names of modules follow DiT / SiT.

Letters: N batch, M modalities, C latent channels of one modality, T tokens, D width, d of a head, p patch.
"""
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def modulate(x, shift, scale):
    """x (N, T, D), shift and scale (N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, *rotation):
        N, T, D = x.shape
        qkv = self.qkv(x).reshape(N, T, 3, self.heads, D // self.heads)  # (N, T, 3, heads, d)
        qkv = qkv.permute(2, 0, 3, 1, 4)                                 # (3, N, heads, T, d)
        q, k = self.turned(qkv[:2], *rotation)                           # each (N, heads, T, d)
        x = F.scaled_dot_product_attention(q, k, qkv[2])                 # (N, heads, T, d)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))             # (N, T, D)

    def turned(self, qk):
        """Queries and keys (2, N, heads, T, d) as they are compared."""
        return qk


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # (N, T, 4D) inside


class Block(nn.Module):
    """A SiT block: attention and MLP, each with adaLN-Zero."""

    rotary = False  # whether forward takes the tokens' rotation
    norm, attention, feed_forward = nn.LayerNorm, Attention, Mlp

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = self.norm(width, elementwise_affine=False, eps=1e-6)
        self.attn = self.attention(width, heads)
        self.norm2 = self.norm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = self.feed_forward(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, *rotation):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)    # each (N, D)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), *rotation)  # (N, T, D)
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))              # (N, T, D)
        return x


# ------------------------------------------------------------------------------------------------
# The same block with what language models have found since (LightningDiT: Yao et al., CVPR 2025).

def rotate(x, rotation):
    """Rotary positions: the pairs (x[i], x[i + d/2]) of x (..., T, d) turned by the angles of each token."""
    cos, sin = rotation.to(x.dtype)                                 # (T, d/2) each
    a, b = x.chunk(2, -1)                                           # (..., T, d/2) each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)    # (..., T, d)


@functools.lru_cache(16)
def rotation_of(h, w, copies, d, device):
    """Cosines and sines (2, copies * h*w, d/2) of the angles by which heads of width d turn a grid's tokens.

    A quarter of d frequencies for the row, as many for the column; tokens of several modalities at one place
    turn alike. The slowest turns once in 2 pi 100 tokens, not 10,000 as in texts: grids are short (Heo et
    al., ECCV 2024). Made once for a grid and a device.
    """
    with torch.inference_mode(False):  # sampling may come first: training must be able to use it
        frequency = 100.0 ** -(torch.arange(d // 4, device=device) / (d / 4))
        rows = torch.arange(h, device=device).repeat_interleave(w)
        columns = torch.arange(w, device=device).repeat(h)
        angle = torch.stack([rows, columns], 1)[..., None] * frequency  # (h*w, 2, d/4)
        angle = angle.flatten(1).repeat(copies, 1)                      # (copies * h*w, d/2)
        return torch.stack([angle.cos(), angle.sin()])


class RotaryAttention(Attention):
    """Queries and keys of unit mean square, without a learned scale, turned by their positions."""

    def turned(self, qk, rotation):
        return rotate(F.rms_norm(qk, qk.shape[-1:], eps=1e-6), rotation)  # (2, N, heads, T, d)


class SwiGlu(nn.Module):
    """Two thirds of Mlp's hidden width, to a multiple of 8: as many weights, for fc1 makes the gate too."""

    def __init__(self, width):
        super().__init__()
        hidden = 8 * round(width / 3)
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, x = self.fc1(x).chunk(2, -1)  # (N, T, 8/3 D) each
        return self.fc2(F.silu(gate) * x)   # (N, T, D)


class ModernBlock(Block):
    """Block with RMS norms, rotary positions, normalised queries and keys, and SwiGLU."""

    rotary = True
    norm, attention, feed_forward = nn.RMSNorm, RotaryAttention, SwiGlu


BLOCKS = {"sit": Block, "modern": ModernBlock}


# ------------------------------------------------------------------------------------------------

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
    """One shared MLP embeds each modality's noise level to D/2; a second one fuses the M embeddings to D.

    Not fused, of one modality alone: the first MLP embeds to D, as in SiT and REPA.
    """

    def __init__(self, width, num_modalities, fused):
        super().__init__()
        part = width // 2 if fused else width
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, part))
        self.mlp_fused = nn.Identity()
        if fused:
            self.mlp_fused = nn.Sequential(nn.Linear(num_modalities * part, width), nn.SiLU(),
                                           nn.Linear(width, width))

    def forward(self, level):                                                        # (N, M) in [0, 1]
        k = torch.arange(128, dtype=torch.float32, device=level.device)
        angle = level[..., None].float() * torch.exp(-math.log(10000) * k / 128)     # (N, M, 128)
        embedding = torch.cat([angle.cos(), angle.sin()], dim=-1)                    # (N, M, 256)
        return self.mlp_fused(self.mlp(embedding).flatten(1))                        # (N, D)
