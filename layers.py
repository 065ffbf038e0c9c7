"""The layers of the transformer. Names of modules follow DiT / SiT.

Letters: N batch, M modalities, C latent channels of one modality, T tokens, D width, p patch.
"""
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
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)  # each (N, D)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))           # (N, T, D)
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))            # (N, T, D)
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
