"""MT-Diffusion's chain, settings and network (Chen et al., ICLR 2024): all that sampling needs.

The forward chain draws the encoded E(X) into the noise (Sec. 2.2.2), heads on the shared backbone give the
noise and X back (Sec. 2.2.3). Steps are k = 0 .. T-1, 0 nearly clean; the backbone's time is 1 - k/T. The
paper's formulas as corrected in MT_DIFFUSION.md: Eq. 5's two means agree, Algorithm 1's noise has variance
b_k. Training is mt_diffusion.py's, the tasks are mt_sample.py's.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import runs
from distributed import autocast
from evaluation import ModelPredictor
from layers import Block
from model import SIZES, build_model

METHOD = "mt-diffusion"  # its name in checkpoints
T = 1000  # steps of the trained chain


# ------------------------------------------------------------------------------------------------
# The chain. Arrays over the steps are numpy float64.

def make_betas(schedule):
    """"linear" (1e-4 to 0.02) or "cosine" (Nichol and Dhariwal) -> (T,)."""
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, T)
    level = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - level[1:] / level[:-1], 0.999)


def aggregate(a, w):
    """Eq. 4: at_k = sqrt(a_k) (w_k + at_{k-1}), the factor of E(X); a (T,), w (..., T) -> (..., T)."""
    shift, last = np.empty_like(w), 0.0
    for k in range(len(a)):
        last = shift[..., k] = np.sqrt(a[k]) * (w[..., k] + last)
    return shift


# The weights w_k of the transition from the step factors a, both (T,): MT_DIFFUSION.md, "The weights w".

def vp_ramp(a):
    return np.sqrt(np.concatenate([[1.0], np.cumprod(a)[:-1]])) / T


def paper(a):
    """App. E: t / (1000 - t)."""
    return np.arange(T) / (T - np.arange(T))


def paper_scaled(a):
    return paper(a) / aggregate(a, paper(a)).max()


def ramp(a):
    return np.arange(T) / T


def revert(a):
    """Ends at N(E(X), 1)."""
    return (1 - np.sqrt(a)) / np.sqrt(a)


def none(a):
    """Plain DDPM."""
    return np.zeros(T)


FAMILIES = {f.__name__: f for f in (vp_ramp, paper, paper_scaled, ramp, revert, none)}


class MTSchedule:
    """The forward chain of z under the encodings e_i of I modalities, and its posterior (Theorem 2), for
    K steps.

    abar (K,) and shift (I, K) define it: q(z_k | z0, X) = N(sqrt(abar_k) z0 + sum_i shift_ik e_i, 1 -
    abar_k). index (K,) are its steps in the trained chain. Tensors z, z0, e are (N, ...), k (N,) long; e is
    a list of I.
    """

    def __init__(self, abar, shift, index):
        abar_before = np.concatenate([np.ones(1), abar[:-1]])
        shift_before = np.concatenate([np.zeros((len(shift), 1)), shift[:, :-1]], 1)
        a = abar / abar_before
        w = shift / np.sqrt(a) - shift_before
        self.abar, self.shift, self.index, self.a, self.w = abar, shift, index, a, w
        self.variance = (1 - a) * (1 - abar_before) / (1 - abar)  # of the posterior
        self.tables = dict(
            signal=np.sqrt(abar),
            noise=np.sqrt(1 - abar),
            from_y=np.sqrt(a) * (1 - abar_before) / (1 - abar),
            from_z0=(1 - a) * np.sqrt(abar_before) / (1 - abar),
            std=np.sqrt(self.variance),
            scale=1 / np.sqrt(1 + (shift ** 2).sum(0)),
        )
        for i in range(len(shift)):
            self.tables.update({f"shift{i}": shift[i], f"before{i}": shift_before[i]})
        self._placed = {}

    @classmethod
    def make(cls, schedule, families):
        """The whole chain of T steps: a schedule's name and a row of FAMILIES for each modality."""
        a = 1 - make_betas(schedule)
        w = np.stack([FAMILIES[family](a) for family in families])
        return cls(np.cumprod(a), aggregate(a, w), np.arange(T))

    def respaced(self, steps):
        """The chain of `steps` of these steps, evenly chosen, with the same marginals there."""
        last = len(self.abar) - 1
        at = np.round(np.linspace(0, last, steps)).astype(int) if steps > 1 else np.array([last])
        return MTSchedule(self.abar[at], self.shift[:, at], self.index[at])

    def at(self, name, k, like):
        """A table's values at k (N,), shaped to multiply `like` (N, ...)."""
        place = name, like.device, like.dtype
        if place not in self._placed:
            self._placed[place] = torch.from_numpy(self.tables[name]).to(like.device, like.dtype)
        return self._placed[place][k].reshape(-1, *[1] * (like.ndim - 1))

    def carried(self, which, e, k):
        """sum_i of the table "shift" or "before" (the shift a step earlier) times e_i."""
        return sum(self.at(f"{which}{i}", k, x) * x for i, x in enumerate(e))

    def q_sample(self, z0, e, k, noise):
        """Eq. 4."""
        return self.at("signal", k, z0) * z0 + self.carried("shift", e, k) + self.at("noise", k, z0) * noise

    def clean(self, z, eps, e, k):
        """z0 of z and its noise."""
        return (z - self.carried("shift", e, k) - self.at("noise", k, z) * eps) / self.at("signal", k, z)

    def mean(self, z, z0, e, k):
        """The posterior's mean, Eq. 5 in z0: DDPM's for z without X's share, and that of a step earlier."""
        plain = self.at("from_y", k, z) * (z - self.carried("shift", e, k)) + self.at("from_z0", k, z) * z0
        return plain + self.carried("before", e, k)


# ------------------------------------------------------------------------------------------------
# The settings (Sec. 4, App. E): which steps, and how a row of the batch is trained.

class Setting(NamedTuple):
    schedule: str
    hidden: float = 0.0      # probability that the network does not see X: it learns to work without
    single: float = 0.0      # probability of plain DDPM conditioned on X: the paper's "*" mix
    full_mask: float = 0.0   # masked: probability that the whole image is hidden, as in generation
    update: str = "mean"     # Algorithm 1, lines 9-11: how an unknown X follows its head


SETTINGS = {
    "pair": Setting("linear", hidden=0.2),                  # z0 the target's latents, X the source's
    "masked": Setting("cosine", hidden=0.1, full_mask=0.1),  # MT-Diffusion-X
    "masked-u": Setting("cosine", hidden=1.0),              # MT-Diffusion-U
    "label": Setting("cosine", hidden=1.0, single=0.3, update="sample"),
    "feature": Setting("cosine", hidden=1.0, single=0.3),
}
PATCHES, PATCH = 10, 16  # masked: up to so many squares of so many pixels


def visible(corners, count, size, patch):
    """Masks (N, 1, H, W), 0 where one of a row's first count (N,) squares lies.

    corners (N, P, 2) are rows and columns, the squares clipped at the border.
    """
    def inside(side, corner):                                                       # (N, P) -> (N, P, side)
        at = torch.arange(side, device=corners.device)
        return (at >= corner[..., None]) & (at < corner[..., None] + patch)

    rows, columns = inside(size[0], corners[..., 0]), inside(size[1], corners[..., 1])
    used = torch.arange(corners.shape[1], device=corners.device) < count[:, None]   # (N, P)
    hit = rows[..., :, None] & columns[..., None, :] & used[..., None, None]        # (N, P, H, W)
    return (~hit.any(1, keepdim=True)).float()


# ------------------------------------------------------------------------------------------------
# The network.

class OutputClassifier(nn.Module):
    """MT-Diffusion-E: a small transformer on z without its noise (N, C, H, W) -> (N, K)."""

    def __init__(self, channels, patch, width, heads, outputs, depth=4):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.linear = nn.Linear(width, outputs)

    def forward(self, x, c, position):
        x = self.proj(x).flatten(2).transpose(1, 2) + position  # (N, tokens, D)
        for block in self.blocks:
            x = block(x, c)                                      # (N, tokens, D)
        return self.linear(x.mean(1))                            # (N, K)


class Chain(NamedTuple):
    """How Algorithm 1 is run: the part of a recipe that the command's flags say."""
    steps: int = 250
    start: str = "shifted"         # z_K around at_K E(X) where X is known, or "standard": N(0, 1)
    x_update: str = None           # how an unknown X follows its head; None: the setting's
    cfg: float = 1.0               # guidance towards a known X, away from the network that does not see it
    classifier_scale: float = 0.0  # guidance by the gradient of log p(class) of the label head
    precision: str = "fp32"


class MTDiffusion(nn.Module):
    """The backbone with a head for the noise and one for X, and both processes.

    Latents z0 (N, C, H, W). X is the source's latents (N, C, H, W) of a pair or of the masked image,
    classes (N,) long, or feature vectors (N, F).

    agg       a row of FAMILIES
    head      of labels: "middle", MT-Diffusion-M, or "output", -E
    features  F of feature vectors
    bound     of what z0 may be
    """

    def __init__(self, backbone, pair, agg="vp_ramp", head="middle", features=None, bound=8.0):
        super().__init__()
        self.setting, self.pair, self.bound, self.features = SETTINGS[pair], pair, bound, features
        self.backbone = backbone
        self.num_classes, self.latent_channels = backbone.num_classes, backbone.latent_channels
        self.latent_size, self.patch_size = backbone.latent_size, backbone.patch_size
        self.images = pair not in ("label", "feature")          # X is an image, encoded by itself
        self.modalities = backbone.modalities if pair == "pair" else ("rgb",)
        self.schedule = MTSchedule.make(self.setting.schedule, [agg])
        self.classifier = self.head = None
        width, heads = backbone.pos_embed.shape[2], backbone.blocks[0].attn.heads
        if pair == "feature":
            backbone.y_embedder = nn.Linear(features, width, bias=False)  # a zero vector is the null
            self.head = nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Linear(1024, features))
        elif pair == "label" and head == "output":
            self.classifier = OutputClassifier(backbone.latent_channels, backbone.patch_size, width, heads,
                                               backbone.num_classes)
        elif pair == "label":
            self.head = nn.Linear(width, backbone.num_classes)
        if not self.images:
            backbone.projector = nn.Identity()              # the tokens after block encoder_depth, the middle

    def null(self, n, device):
        """The X that says nothing, for n rows."""
        if self.pair == "feature":
            return torch.zeros(n, self.features, device=device)
        return torch.full((n,), self.num_classes, device=device)

    def forward(self, z, k, x, seen):
        """z (N, C, H, W) at steps k (N,) -> the noise like z, X like x (logits for classes).

        The rows seen (N,) bool are shown X.
        """
        N, time = len(z), 1 - k / T
        null = self.null(N, z.device)
        if self.images:
            shown = torch.where(seen[:, None, None, None], x, 0.0)                   # (N, C, H, W)
            given = torch.stack([torch.zeros_like(seen), seen], 1)                   # (N, 2)
            times = torch.stack([time, seen.float()], 1)                             # (N, 2)
            both, _ = self.backbone(torch.cat([z, shown], 1), times, null, given)    # (N, 2C, H, W)
            out, predicted = both.chunk(2, 1)                                        # (N, C, H, W) each
            return self.noise_of(z, k, out), predicted
        y = torch.where(seen if x.ndim == 1 else seen[:, None], x, null)             # (N,) or (N, F)
        nothing = torch.zeros_like(seen)[:, None]                                    # (N, 1)
        out, tokens = self.backbone(z, time[:, None], y, nothing)  # (N, C, H, W), (N, tokens, D)
        eps = self.noise_of(z, k, out)
        if self.classifier is None:
            return eps, self.head(tokens.mean(1))                                    # (N, K) or (N, F)
        unit = torch.where(seen[:, None, None, None], 1.0, self.schedule.at("scale", k, z))  # look()'s
        clean = z.float() / unit - self.schedule.at("noise", k, z) * eps             # sqrt(abar) z0, and E(X)
        c = self.backbone.t_embedder(1 - time[:, None])                              # (N, D)
        grid = (side // self.patch_size for side in z.shape[2:])
        return eps, self.classifier(clean, c, self.backbone.positions(*grid))

    def noise_of(self, z, k, out):
        """eps = sqrt(1-abar) z + sqrt(abar) out.

        Where z is nearly noise, an error of the network is as small as what is left of z0.
        """
        return self.schedule.at("noise", k, z) * z + self.schedule.at("signal", k, z) * out.float()

    @torch.no_grad()
    def encode(self, x):
        """E(X) like z: an image itself; of a class or vector what the backbone makes of it at z, k = 0."""
        if self.images:
            return x
        if not self.schedule.shift.any():
            return x.new_zeros((len(x), 1, 1, 1), dtype=torch.float32)
        kinds, at = x, slice(None)
        if x.ndim == 1 and self.num_classes < len(x):  # few classes: each once
            kinds = torch.arange(self.num_classes, device=x.device)
            at = x.clamp(max=self.num_classes - 1)
        z = torch.zeros(len(kinds), self.latent_channels, *self.latent_size, device=x.device)
        k = torch.zeros(len(kinds), dtype=torch.long, device=x.device)
        return self(z, k, kinds, k == 0)[0].float()[at]

    def look(self, schedule, z, e, k, seen):
        """What the network is fed: z without X's share where it sees X, else z at unit scale."""
        without = z - schedule.carried("shift", [e], k)
        return torch.where(seen[:, None, None, None], without, schedule.at("scale", k, z) * z)

    def x_error(self, predicted, x, known=None):
        """-log p(X | z) up to constants, per row (N,): cross-entropy for classes, else the mean square, of
        maps over the known cells (N, H, W), None for all.
        """
        if self.pair == "label":
            return F.cross_entropy(predicted.float(), x, reduction="none")
        return mean_square(predicted.float() - x, known if self.images else None)

    def follow(self, predicted, rule, noise):
        """Algorithm 1, line 10: X from its head: "mean", "argmax", or "sample" from its distribution."""
        if self.pair != "label":
            return predicted.float()
        if rule == "argmax":
            return predicted.argmax(1)
        uniform = torch.special.ndtr(noise((self.num_classes,))).clamp(1e-6, 1 - 1e-6)
        return (predicted.float() - (-uniform.log()).log()).argmax(1)  # Gumbel's way to draw a class

    def unknown(self, noise, shape):
        """The random X of Algorithm 1, line 3."""
        if self.pair == "label":
            return self.follow(noise((self.num_classes,)) * 0, "sample", noise)  # all classes alike
        return noise(shape if self.images else (self.features,))

    def sample(self, noise, known, x, chain, begin=None, size=None):
        """Algorithm 1 -> z0 (N, C, H, W) and X.

        noise(shape) gives standard normals (N, *shape); known (N,) bool says for which rows x is given. An
        unknown X starts at random and follows its head. begin (z0, share of the steps): SDEdit, from these
        latents noised so far. Where a class or a vector is known, this is plain DDPM conditioned on it.
        """
        return Walk(self, noise, known, chain).run(x, begin, size or self.latent_size)

    @torch.no_grad()
    def recognise(self, z0, noise, level=50, precision="fp32"):
        """X from images by its head: the output of the head for latents z0 noised to step `level`."""
        k = torch.full((len(z0),), level, device=z0.device)
        nothing, off = torch.zeros_like(z0), torch.zeros(len(z0), dtype=torch.bool, device=z0.device)
        z = self.schedule.q_sample(z0, [nothing], k, noise(z0.shape[1:]))
        with autocast(z0.device, precision):
            z = self.look(self.schedule, z, nothing, k, off)
            return self(z, k, self.null(len(z0), z0.device), off)[1].float()


def mean_square(x, known=None):
    """(N, ...) -> (N,); of maps (N, C, H, W) over the known cells (N, H, W), None for all."""
    if known is None:
        return x.square().flatten(1).mean(1)
    cells = torch.where(known, x.square().mean(1), 0.0).sum((1, 2))
    return cells / known.sum((1, 2)).clamp(min=1)


def per_row(mask, like):
    """mask (N,) shaped to select of `like` (N, ...)."""
    return mask.reshape(-1, *[1] * (like.ndim - 1))


class Walk:
    """One walk of Algorithm 1 back through the chain, for the rows of a batch."""

    def __init__(self, model, noise, known, chain):
        self.model, self.noise, self.known, self.chain = model, noise, known, chain
        self.schedule = model.schedule.respaced(chain.steps)
        self.rule = chain.x_update or model.setting.update
        self.nobody = torch.zeros_like(known)
        carries = torch.ones_like(known) if model.images else ~known  # a class that is known is not in z
        self.carries = carries[:, None, None, None].float()

    def step(self, i):
        """Step i of the walk for all rows (N,)."""
        return torch.full((len(self.known),), i, device=self.known.device)

    def encoded(self, x):
        """E(X) of the rows whose z carries it."""
        if not self.carries.any():
            return self.carries  # zeros
        with autocast(self.known.device, self.chain.precision):
            return self.carries * self.model.encode(x)

    def network(self, z, e, x, i, seen):
        """The noise of z and the head's X."""
        with autocast(z.device, self.chain.precision):
            fed = self.model.look(self.schedule, z, e, self.step(i), seen)
            eps, predicted = self.model(fed, self.step(int(self.schedule.index[i])), x, seen)
        return eps.float(), predicted.float()

    def guided(self, z, e, x, i):
        """The same, with both guidances."""
        cfg, scale = self.chain.cfg, self.chain.classifier_scale
        eps, predicted = self.network(z, e, x, i, self.known)
        if cfg != 1.0:
            free, _ = self.network(z, e, x, i, self.nobody)
            eps = torch.where(per_row(self.known, eps), free + cfg * (eps - free), eps)
        if scale:
            gradient = self.class_gradient(z, e, x, i)
            eps = eps - scale * self.schedule.at("noise", self.step(i), z) * gradient * per_row(self.known, z)
        return eps, predicted

    def class_gradient(self, z, e, x, i):
        """The gradient of log p(class | z) of the label head."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            chance = self.network(z, e, x, i, self.nobody)[1].log_softmax(1)
            chosen = chance.gather(1, x.clamp(max=self.model.num_classes - 1)[:, None])
            return torch.autograd.grad(chosen.sum(), z)[0]

    @torch.no_grad()
    def run(self, x, begin, size):
        """-> z0 (N, C, *size) and X; x, begin as of MTDiffusion.sample."""
        model, schedule, known, noise = self.model, self.schedule, self.known, self.noise
        shape, K = (model.latent_channels, *size), self.chain.steps
        moves = model.pair == "label" or not known.all()  # labels: always, for equal noise
        if moves:
            guess = model.unknown(noise, shape)
            x = guess if x is None else torch.where(per_row(known, guess), x, guess)
        e, z = self.encoded(x), noise(shape)
        if begin is not None:
            origin, share = begin
            K = max(1, round(share * K))
            z = schedule.q_sample(origin, [e], self.step(K - 1), z)
        elif self.chain.start == "shifted":
            z = z + per_row(known, z) * schedule.carried("shift", [e], self.step(K - 1))
        for i in reversed(range(K)):
            eps, predicted = self.guided(z, e, x, i)
            if moves:
                fresh = model.follow(predicted, self.rule, noise)
                x = torch.where(per_row(known, fresh), x, fresh)
                e = self.encoded(x)
            z0 = schedule.clean(z, eps, [e], self.step(i)).clamp(-model.bound, model.bound)
            z = schedule.mean(z, z0, [e], self.step(i))
            if i > 0:
                z = z + schedule.at("std", self.step(i), z) * noise(shape)
        return z, x


def draw_images(model, y, noise, chain, source=None):
    """All modalities, scaled latents (N, M*C, H, W), from classes y (N,) or source latents (N, C, H, W)."""
    size = model.latent_size if source is None else source.shape[2:]
    known = torch.full_like(y, source is not None, dtype=torch.bool)
    if model.pair == "pair":
        return torch.cat(model.sample(noise, known, source, chain, size=size), 1)
    if model.pair == "label":
        return model.sample(noise, y < model.num_classes, y, chain, size=size)[0]
    if model.pair == "masked":  # MT-Diffusion-X generates from a mask over everything
        nothing = torch.zeros(len(y), model.latent_channels, *size, device=y.device)
        return model.sample(noise, ~known, nothing, chain, size=size)[0]
    return model.sample(noise, known, None, chain, size=size)[0]


class TranslationPredictor(ModelPredictor):
    """A predictor of evaluation.py; sampling is a Chain."""

    def latents(self, rgb, y, noise):
        return draw_images(self.model, y, noise, self.sampling, rgb)


def build(name, pair, modalities, num_classes, latent_channels, latent_size, **options):
    """A freshly initialised MTDiffusion of a row of SIZES; pair is "pair" (modalities: target, source) or
    another row of SETTINGS.

    options: those of OPTIONS. The arguments are kept in model.config, from which a checkpoint rebuilds the
    model.
    """
    options = {**OPTIONS, **{key: value for key, value in options.items() if key != "projector"}}
    inner = {key: options[key] for key in BACKBONE}
    backbone = build_model(name, modalities, num_classes, latent_channels, latent_size,
                           encoder_depth=SIZES[name][0] // 2, projector=False, **inner)
    own = {key: value for key, value in options.items() if key not in BACKBONE}
    model = MTDiffusion(backbone, pair, **own)
    model.config = dict(name=name, pair=pair, modalities=list(modalities), num_classes=num_classes,
                        latent_channels=latent_channels, latent_size=list(backbone.latent_size), **options)
    return model


BACKBONE = {"patch_size": 2, "fusion": "linear", "blocks": "sit"}
OPTIONS = {**BACKBONE, **runs.options_of(MTDiffusion)}  # what a checkpoint that lacks one was trained with
