"""MT-Diffusion (Chen et al., ICLR 2024) on MMGen's backbone: images and a second modality X in one diffusion chain.

    python train.py --method mt-diffusion --pair rgb seg --run runs/mt --data data/toy --model T/2    # rgb -> seg, and both from noise
    python train.py --method mt-diffusion --pair masked ...                               # or masked-u, label, feature
    python sample.py --task translate --image photo.jpg --ckpt runs/mt                    # the checkpoint says what it is

The forward chain draws the encoded E(X) into the noise (Sec. 2.2.2), heads on the shared backbone give the noise and X
back (Sec. 2.2.3), and one loss trains both (Eq. 6). Steps are k = 0 .. T-1, 0 nearly clean; the backbone's time is 1 - k/T.
The paper's formulas as corrected in the README: Eq. 5's two means agree, Algorithm 1's noise has variance b_k.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from distributed import InputError, autocast
from model import SIZES, Block, build_model, training_flops
from prep_latents import latents
from weights import fit

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
    """Eq. 4: the factor of E(X) in the marginal, at_k = sqrt(a_k) (w_k + at_{k-1}); a (T,), w (..., T) -> (..., T)."""
    shift, last = np.empty_like(w), 0.0
    for k in range(len(a)):
        last = shift[..., k] = np.sqrt(a[k]) * (w[..., k] + last)
    return shift


def _paper(a):
    return np.arange(T) / (T - np.arange(T))


FAMILIES = {  # w_k of the transition, from a (T,): README, "the weights w"
    "vp_ramp": lambda a: np.sqrt(np.concatenate([[1.0], np.cumprod(a)[:-1]])) / T,
    "paper": _paper,                                                    # App. E: t / (1000 - t)
    "paper_scaled": lambda a: _paper(a) / aggregate(a, _paper(a)).max(),
    "ramp": lambda a: np.arange(T) / T,
    "revert": lambda a: (1 - np.sqrt(a)) / np.sqrt(a),                  # ends at N(E(X), 1)
    "none": lambda a: np.zeros(T),                                      # plain DDPM
}


def make_weights(family, a):
    """The weights w (T,) of a row of FAMILIES for the step factors a (T,)."""
    return FAMILIES[family](a)


class MTSchedule:
    """The forward chain of z under the encodings e_i of I modalities, and its posterior (Theorem 2), for K steps.

    abar (K,) and shift (I, K) define it: q(z_k | z0, X) = N(sqrt(abar_k) z0 + sum_i shift_ik e_i, 1 - abar_k).
    index (K,) are its steps in the trained chain. Tensors z, z0, e are (N, ...), k (N,) long; e is a list of I.
    """

    def __init__(self, abar, shift, index):
        first = np.ones(1), np.zeros((len(shift), 1))
        before = np.concatenate([first[0], abar[:-1]]), np.concatenate([first[1], shift[:, :-1]], 1)
        a = abar / before[0]
        self.abar, self.shift, self.index, self.a, self.placed = abar, shift, index, a, {}
        self.w = shift / np.sqrt(a) - before[1]
        self.variance = (1 - a) * (1 - before[0]) / (1 - abar)                # of the posterior
        self.tables = dict(signal=np.sqrt(abar), noise=np.sqrt(1 - abar), from_y=np.sqrt(a) * (1 - before[0]) / (1 - abar),
                           from_z0=(1 - a) * np.sqrt(before[0]) / (1 - abar), root=np.sqrt(a), eps=(1 - a) / np.sqrt(1 - abar),
                           std=np.sqrt(self.variance), scale=1 / np.sqrt(1 + (shift ** 2).sum(0)))
        for i in range(len(shift)):
            self.tables.update({f"shift{i}": shift[i], f"before{i}": before[1][i], f"w{i}": self.w[i]})

    @classmethod
    def make(cls, schedule, families):
        """The whole chain of T steps: a schedule's name and a family for each modality."""
        a = 1 - make_betas(schedule)
        return cls(np.cumprod(a), aggregate(a, np.stack([make_weights(family, a) for family in families])), np.arange(T))

    def respaced(self, steps):
        """The chain of `steps` of these steps, evenly chosen, with the same marginals there."""
        at = np.round(np.linspace(0, len(self.abar) - 1, steps)).astype(int) if steps > 1 else np.array([len(self.abar) - 1])
        return MTSchedule(self.abar[at], self.shift[:, at], self.index[at])

    def at(self, name, k, like):
        """A table's values at k (N,), shaped to multiply `like` (N, ...)."""
        place = name, like.device, like.dtype
        if place not in self.placed:
            self.placed[place] = torch.from_numpy(self.tables[name]).to(like.device, like.dtype)
        return self.placed[place][k].reshape(-1, *[1] * (like.ndim - 1))

    def carried(self, which, e, k):
        """sum_i of the table "shift", "before" (the shift a step earlier) or "w" times e_i."""
        return sum(self.at(f"{which}{i}", k, x) * x for i, x in enumerate(e))

    def q_sample(self, z0, e, k, noise):
        """Eq. 4."""
        return self.at("signal", k, z0) * z0 + self.carried("shift", e, k) + self.at("noise", k, z0) * noise

    def clean(self, z, eps, e, k):
        """z0 of z and its noise."""
        return (z - self.carried("shift", e, k) - self.at("noise", k, z) * eps) / self.at("signal", k, z)

    def mean(self, z, z0, e, k):
        """The posterior's mean, Eq. 5 in z0: DDPM's for z - shift e, which carries no X, and X's share a step earlier."""
        return self.at("from_y", k, z) * (z - self.carried("shift", e, k)) + self.at("from_z0", k, z) * z0 + self.carried("before", e, k)

    def mean_from_eps(self, z, eps, e, k):
        """The same in the noise."""
        return (z - self.at("eps", k, z) * eps) / self.at("root", k, z) - self.carried("w", e, k)


# ------------------------------------------------------------------------------------------------
# The settings (Sec. 4, App. E): which steps, and how a row of the batch is trained.

class Setting(NamedTuple):
    schedule: str
    hidden: float = 0.0      # probability that the network does not see X: it learns to work without
    single: float = 0.0      # probability of plain DDPM conditioned on X: the paper's "*" mix
    full_mask: float = 0.0   # masked: probability that the whole image is hidden, as in generation
    update: str = "mean"     # Algorithm 1, lines 9-11: how an unknown X follows its head


SETTINGS = {
    "pair": Setting("linear", hidden=0.2),                            # z0 the target's latents, X the source's
    "masked": Setting("cosine", hidden=0.1, full_mask=0.1),           # MT-Diffusion-X
    "masked-u": Setting("cosine", hidden=1.0),                        # MT-Diffusion-U
    "label": Setting("cosine", hidden=1.0, single=0.3, update="sample"),
    "feature": Setting("cosine", hidden=1.0, single=0.3),
}
PATCHES, PATCH = 10, 16  # masked: up to so many squares of so many pixels


def visible(corners, count, size, patch):
    """Masks (N, 1, H, W), 0 where one of a row's first count (N,) squares lies; corners (N, P, 2) rows and columns, clipped at the border."""
    y, x = (torch.arange(s, device=corners.device) for s in size)
    inside = lambda at, corner: (at >= corner[..., None]) & (at < corner[..., None] + patch)             # (N, P, H) or (N, P, W)
    used = torch.arange(corners.shape[1], device=corners.device) < count[:, None]                        # (N, P)
    hit = inside(y, corners[..., 0])[..., :, None] & inside(x, corners[..., 1])[..., None, :]            # (N, P, H, W)
    return (~(hit & used[..., None, None]).any(1, keepdim=True)).float()


class OutputClassifier(nn.Module):
    """MT-Diffusion-E: a small transformer on the denoised latents (N, C, H, W) -> (N, K); c (N, D) as in the backbone."""

    def __init__(self, channels, patch, width, heads, outputs, depth=4):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.linear = nn.Linear(width, outputs)

    def forward(self, x, c, position):
        x = self.proj(x).flatten(2).transpose(1, 2) + position  # (N, T, D)
        for block in self.blocks:
            x = block(x, c)                                      # (N, T, D)
        return self.linear(x.mean(1))                            # (N, K)


class MTDiffusion(nn.Module):
    """The backbone with a head for the noise and one for X, and both processes.

    Latents z0 (N, C, H, W). X is the source's latents (N, C, H, W) of a pair or of the masked image, classes (N,) long, or
    feature vectors (N, F).
    """

    def __init__(self, backbone, pair, agg, head, features, bound):
        super().__init__()
        self.setting = SETTINGS[pair if pair in SETTINGS else "pair"]
        self.pair, self.bound, self.features, self.backbone = pair, bound, features, backbone
        self.num_classes, self.latent_channels, self.latent_size = backbone.num_classes, backbone.latent_channels, backbone.latent_size
        self.images = pair not in ("label", "feature")          # X is an image, encoded by itself
        self.modalities = backbone.modalities if pair == "pair" else ("rgb",)
        self.conditions = (1,) if pair == "pair" else ()        # of its modalities, what may be given
        self.patch_size = backbone.patch_size
        self.schedule = MTSchedule.make(self.setting.schedule, [agg])
        self.classifier = self.head = None
        width, heads = backbone.pos_embed.shape[2], backbone.blocks[0].attn.heads
        if pair == "feature":
            backbone.y_embedder = nn.Linear(features, width, bias=False)  # a zero vector is the null
            self.head = nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Linear(1024, features))
        elif pair == "label" and head == "output":
            self.classifier = OutputClassifier(backbone.latent_channels, backbone.patch_size, width, heads, backbone.num_classes)
        elif pair == "label":
            self.head = nn.Linear(width, backbone.num_classes)
        if not self.images:
            backbone.projector = nn.Identity()                   # the tokens after block encoder_depth, the middle

    def null(self, n, device):
        """The X that says nothing, for n rows."""
        if self.pair == "feature":
            return torch.zeros(n, self.features, device=device)
        return torch.full((n,), self.num_classes, device=device)

    def forward(self, z, k, x, seen):
        """z (N, C, H, W) at steps k (N,) -> the noise like z, X like x (logits for classes); the rows seen (N,) bool are shown X."""
        N, time = len(z), 1 - k / T
        null = self.null(N, z.device)
        if self.images:
            shown = torch.where(seen[:, None, None, None], x, 0.0)                                 # (N, C, H, W)
            given = torch.stack([torch.zeros_like(seen), seen], 1)                                 # (N, 2)
            both, _ = self.backbone(torch.cat([z, shown], 1), torch.stack([time, seen.float()], 1), null, given)
            out, predicted = both.chunk(2, 1)                                                      # (N, C, H, W) each
            return self.noise_of(z, k, out), predicted
        y = torch.where(seen if x.ndim == 1 else seen[:, None], x, null)                           # (N,) or (N, F)
        out, tokens = self.backbone(z, time[:, None], y, torch.zeros_like(seen)[:, None])          # (N, C, H, W), (N, T, D)
        eps = self.noise_of(z, k, out)
        if self.classifier is None:
            return eps, self.head(tokens.mean(1))                                                  # (N, K) or (N, F)
        unit = torch.where(seen[:, None, None, None], 1.0, self.schedule.at("scale", k, z))        # of look
        clean = z.float() / unit - self.schedule.at("noise", k, z) * eps                           # sqrt(abar) z0: bounded at every k
        c = self.backbone.t_embedder(1 - time[:, None])                                            # (N, D)
        return eps, self.classifier(clean, c, self.backbone._positions(*(s // self.backbone.patch_size for s in z.shape[2:])))

    def noise_of(self, z, k, out):
        """eps = sqrt(1-abar) z + sqrt(abar) out: where z is nearly noise, an error of the network is as small as what is left of z0."""
        return self.schedule.at("noise", k, z) * z + self.schedule.at("signal", k, z) * out.float()

    @torch.no_grad()
    def encode(self, x):
        """E(X) like z: an image is its own code; of a class or a vector what the backbone makes of it at z = 0, k = 0."""
        if self.images or not self.schedule.shift.any():
            return x if self.images else x.new_zeros((len(x), 1, 1, 1), dtype=torch.float32)
        kinds, at = x, slice(None)
        if x.ndim == 1 and self.num_classes < len(x):  # few classes: each once
            kinds, at = torch.arange(self.num_classes, device=x.device), x.clamp(max=self.num_classes - 1)
        z = torch.zeros(len(kinds), self.latent_channels, *self.latent_size, device=x.device)
        on = torch.ones(len(kinds), dtype=torch.bool, device=x.device)
        return self(z, torch.zeros(len(kinds), dtype=torch.long, device=x.device), kinds, on)[0].float()[at]

    def look(self, schedule, z, e, k, seen):
        """What the network is fed: z without X's share where it sees X (the same knowledge, and small), else z at unit scale."""
        return torch.where(seen[:, None, None, None], z - schedule.carried("shift", [e], k), schedule.at("scale", k, z) * z)

    def x_error(self, predicted, x):
        """-log p(X | z) up to constants, per row (N,): cross-entropy for classes, else the mean square."""
        if self.pair == "label":
            return F.cross_entropy(predicted.float(), x, reduction="none")
        return (predicted.float() - x).square().flatten(1).mean(1)

    def follow(self, predicted, rule, noise):
        """Algorithm 1, line 10: a new X from its head's output: "mean", "argmax", or "sample" from the head's distribution."""
        if self.pair != "label":
            return predicted.float()
        if rule == "argmax":
            return predicted.argmax(1)
        uniform = torch.special.ndtr(noise((self.num_classes,))).clamp(1e-6, 1 - 1e-6)
        return (predicted.float() - (-uniform.log()).log()).argmax(1)  # Gumbel's way to draw a class

    def unknown(self, noise, shape):
        """The random X of Algorithm 1, line 3."""
        if self.pair == "label":
            return self.follow(noise((self.num_classes,)) * 0, "sample", noise)
        return noise(shape if self.images else (self.features,))

    @torch.no_grad()
    def sample(self, noise, known, x=None, steps=250, start="shifted", x_update=None, cfg=1.0, classifier_scale=0.0, begin=None, precision="fp32", size=None):
        """Algorithm 1 -> z0 (N, C, H, W) and X.

        noise(shape) gives standard normals (N, *shape); known (N,) bool says for which rows x is given. An unknown X starts at
        random and follows its head by x_update. start: "shifted", z_K from N(at_K E(X), 1) where X is known, or "standard",
        from N(0, 1) as the paper writes. begin (z0, share of the steps): SDEdit, from these latents noised so far.
        Where a class or a vector is known, this is plain DDPM conditioned on it. cfg guides towards a known X, away from the
        network that does not see it; classifier_scale by the gradient of log p(class) of the label head.
        """
        shape, schedule, K = (self.latent_channels, *(size or self.latent_size)), self.schedule.respaced(steps), steps
        rule, nobody = x_update or self.setting.update, torch.zeros_like(known)
        beside = lambda mask, like: mask.reshape(-1, *[1] * (like.ndim - 1))
        index = lambda i: torch.full((len(known),), i, device=known.device)

        def network(z, e, x, i, seen):
            with autocast(z.device, precision):
                eps, predicted = self(self.look(schedule, z, e, index(i), seen), index(int(schedule.index[i])), x, seen)
            return eps.float(), predicted.float()

        def guided(z, e, x, i):
            """The noise of z and the head's X."""
            eps, predicted = network(z, e, x, i, known)
            if cfg != 1.0:
                free, _ = network(z, e, x, i, nobody)
                eps = torch.where(beside(known, eps), free + cfg * (eps - free), eps)
            if classifier_scale:
                with torch.enable_grad():
                    at = z.detach().requires_grad_()
                    chance = network(at, e, x, i, nobody)[1].log_softmax(1).gather(1, x.clamp(max=self.num_classes - 1)[:, None])
                    gradient, = torch.autograd.grad(chance.sum(), at)
                eps = eps - classifier_scale * schedule.at("noise", index(i), z) * gradient * beside(known, z)
            return eps, predicted

        free_x = self.pair == "label" or not known.all()  # labels: draw whatever is known of the others in the batch
        if free_x:
            guess = self.unknown(noise, shape)
            x = guess if x is None else torch.where(beside(known, guess), x, guess)
        carries = (torch.ones_like(known) if self.images else ~known)[:, None, None, None].float()
        silent = not carries.any()  # classes that are all known

        def encoded(x):
            with autocast(known.device, precision):
                return carries if silent else carries * self.encode(x)
        e, z = encoded(x), noise(shape)
        if begin is not None:
            K = max(1, round(begin[1] * steps))
            z = schedule.q_sample(begin[0], [e], index(K - 1), z)
        elif start == "shifted":
            z = z + beside(known, z) * schedule.carried("shift", [e], index(K - 1))
        for i in reversed(range(K)):
            eps, predicted = guided(z, e, x, i)
            if free_x:
                fresh = self.follow(predicted, rule, noise)
                x = torch.where(beside(known, fresh), x, fresh)
                e = encoded(x)
            z0 = schedule.clean(z, eps, [e], index(i)).clamp(-self.bound, self.bound)
            z = schedule.mean(z, z0, [e], index(i))
            if i > 0:
                z = z + schedule.at("std", index(i), z) * noise(shape)
        return z, x

    @torch.no_grad()
    def recognise(self, z0, noise, level=50, precision="fp32"):
        """X from images by its head: the output of the head for latents z0 noised to step `level`."""
        k = torch.full((len(z0),), level, device=z0.device)
        nothing, off = torch.zeros_like(z0), torch.zeros(len(z0), dtype=torch.bool, device=z0.device)
        z = self.schedule.q_sample(z0, [nothing], k, noise(z0.shape[1:]))
        with autocast(z0.device, precision):
            return self(self.look(self.schedule, z, nothing, k, off), k, self.null(len(z0), z0.device), off)[1].float()


def build(name, pair, modalities, num_classes, latent_channels, latent_size, agg="vp_ramp", head="middle", features=None, bound=8.0,
          patch_size=2, fusion="linear", projector=False):
    """A freshly initialised MTDiffusion of a row of SIZES; pair is "pair" (modalities: target, source) or a row of SETTINGS.

    The arguments are kept in model.config, from which a checkpoint rebuilds the model. projector is not used.
    """
    backbone = build_model(name, modalities, num_classes, latent_channels, latent_size, encoder_depth=SIZES[name][0] // 2, projector=False,
                           patch_size=patch_size, fusion=fusion)
    model = MTDiffusion(backbone, pair, agg, head, features, bound)
    model.config = dict(name=name, pair=pair, modalities=list(modalities), num_classes=num_classes, latent_channels=latent_channels,
                        latent_size=list(backbone.latent_size), agg=agg, head=head, features=features, bound=bound, patch_size=patch_size, fusion=fusion)
    return model


# ------------------------------------------------------------------------------------------------
# Training: an objective for train.py's loop.

class Objective:
    """Eq. 6: the noise's mean square, plus x_weight times X's error on the rows that carry X. See train.MMGen for the contract."""

    method, aligned = "mt-diffusion", False

    @staticmethod
    def add_flags(group):
        return [group.add_argument("--pair", nargs="+", metavar="X", help="SOURCE TARGET modalities, or masked, masked-u, label, feature"),
                group.add_argument("--agg", default="vp_ramp", choices=list(FAMILIES), help="the weights w of the forward aggregation"),
                group.add_argument("--patch-size", type=int, default=2, help="4 for pixels (a cache of --vae none)"),
                group.add_argument("--head", default="middle", choices=("middle", "output"), help="label: MT-Diffusion-M or -E"),
                group.add_argument("--x-weight", type=float, default=0.1, help="lambda of Eq. 6; 0 is the single task"),
                group.add_argument("--eps-weight", type=float, default=1.0, help="0 trains the head of X alone"),
                group.add_argument("--hidden", type=float, help="share of rows whose X the network does not see; default: the setting's"),
                group.add_argument("--single", type=float, help="label, feature: share of rows of plain DDPM conditioned on X (0.3)")]

    def __init__(self, args, cache, device):
        meta, self.args, self.device = cache.meta, args, device
        if not args.pair or args.patch_size < 1:
            raise InputError(f"--method mt-diffusion: needs --pair; --patch-size {args.patch_size} must be at least 1")
        kind = args.pair[0] if len(args.pair) == 1 else "pair"
        names = {"pair": args.pair[::-1], "masked": ["rgb", "rgb"], "masked-u": ["rgb", "rgb"]}.get(kind, ["rgb"])
        missing = [m for m in names if m not in cache.modalities]
        if kind not in SETTINGS or (kind == "pair") != (len(args.pair) == 2 and args.pair[0] != args.pair[1]) or missing:
            raise InputError(f"--pair {' '.join(args.pair)}: give two modalities of the cache ({', '.join(cache.modalities)}), SOURCE TARGET, "
                             f"or one of {', '.join(list(SETTINGS)[1:])}")
        if not args.eps_weight and not args.x_weight:
            raise InputError("--eps-weight 0 --x-weight 0: nothing would be trained")
        if args.head != "middle" and kind != "label":
            raise InputError(f"--head {args.head}: belongs to --pair label")
        if (args.single is not None and kind not in ("label", "feature")) or (args.hidden is not None and kind not in ("pair", "masked")):
            raise InputError(f"--pair {kind}: --single is of label and feature, --hidden of two modalities and masked")
        if kind == "feature" and not cache.meta.get("feature"):
            raise InputError(f"--pair feature: {args.data} has no feature vectors; make it with prep_latents.py --feature NAME")
        self.model = build(args.model, kind, names, meta["num_classes"], meta["latent_channels"], meta["latent_size"], args.agg, args.head,
                           meta["feature_size"] if kind == "feature" else None, 1.0 if meta["vae"] == "none" else 8.0, args.patch_size, args.fusion)
        self.backbone, self.meta, self.sources = self.model.backbone, meta, list(dict.fromkeys(names))
        self.reads = [*self.sources, *{"label": ["labels"], "feature": ["feature"]}.get(kind, [])]
        given = {"hidden": args.hidden, "single": args.single}
        for name, value in {**given, "x-weight": args.x_weight, "eps-weight": args.eps_weight}.items():
            if value is not None and not 0 <= value <= (1 if name in given else 1e3):
                raise InputError(f"--{name} {value}: must lie in [0, {1 if name in given else 1000}]")
        self.setting = self.model.setting._replace(**{k: v for k, v in given.items() if v is not None})
        self.recipe = dict(agg=args.agg, x_weight=args.x_weight, eps_weight=args.eps_weight, **self.setting._asdict())
        self.size = torch.tensor(meta["latent_size"], device=device)
        self.names = ("loss_eps", "loss_x", "energy")  # energy: mean square of E(X), 0 before anything is learnt
        self.weights = torch.tensor([args.eps_weight, args.x_weight, 0.0], device=device)

    def summary(self):
        return (f"MT-Diffusion {' '.join(self.args.pair)} ({self.args.agg}), "
                f"{training_flops(**self.backbone.config) / 1e9:.1f} GFLOPs a sample and step in the backbone")

    def initialise(self, checkpoint, path):
        """--init: the backbone from any checkpoint, the heads from one of this method -> the table of what was taken."""
        heads, mine = {}, self.model.state_dict()
        if checkpoint["config"]["train"].get("method") == self.method:
            heads = {k: v for k, v in checkpoint["ema"].items() if not k.startswith("backbone.") and k in mine and mine[k].shape == v.shape}
            self.model.load_state_dict(heads, strict=False)
        return fit(self.backbone, self.meta, checkpoint, path, self.method) + (f"\n  of X's head: {', '.join(sorted(heads))}" if heads else "")

    def prepare(self, step, batch, part):
        """A step's draws for the whole global batch, those of this process (slice part) beside its data -> tensors for loss, rows that count per loss (3,)."""
        N, C, size = self.args.batch_size, self.meta["latent_channels"], self.meta["latent_size"]
        g = torch.Generator(self.device).manual_seed((self.args.seed * 0x9E3779B1 + step) % 2 ** 32)
        rand = lambda *shape: torch.rand(shape, generator=g, device=self.device)
        k, count = (rand(N) * T).long(), (rand(N) * (PATCHES + 1)).long()
        hidden, single, full = rand(N) < self.setting.hidden, rand(N) < self.setting.single, rand(N) < self.setting.full_mask
        corners = (rand(N, PATCHES, 2) * self.size).long()
        posterior = torch.randn((N, C * len(self.sources), *size), generator=g, device=self.device)
        noise = torch.randn((N, C, *size), generator=g, device=self.device)
        everyone = torch.full((), N, device=self.device)
        counts = torch.stack([everyone, (~single).sum(), everyone])
        z0, x = latents(batch, self.sources, posterior[part], self.meta["scale"], C), None         # (rows, C or 2C, H, W)
        if self.model.pair == "pair":
            z0, x = z0.chunk(2, 1)
        elif self.model.images:
            patch = max(1, round(PATCH * size[0] / self.meta["resolution"]))
            mask = visible(corners[part], count[part], size, patch)                                # (rows, 1, H, W)
            x = z0 * torch.where(full[part, None, None, None], 0.0, mask)
        else:
            x = batch["labels"] if self.model.pair == "label" else batch["feature"].float()
        return dict(z0=z0, x=x, k=k[part], noise=noise[part], seen=(single | ~hidden)[part], alone=single[part]), counts

    def loss(self, network, rows):
        z0, x, k, alone = rows["z0"], rows["x"], rows["k"], rows["alone"]
        with autocast(self.device, self.args.precision):  # left before the next: it keeps casts made without gradient
            e = torch.where(alone[:, None, None, None], 0.0, self.model.encode(x))                 # (n, C, H, W)
        z = self.model.schedule.q_sample(z0, [e], k, rows["noise"])                                # (n, C, H, W)
        with autocast(self.device, self.args.precision):
            eps, predicted = network(self.model.look(self.model.schedule, z, e, k, rows["seen"]), k, x, rows["seen"])
        error = (eps.float() - rows["noise"]).square().flatten(1).mean(1).sum()
        about = torch.where(alone, 0.0, self.model.x_error(predicted, x)).sum()
        return torch.stack([error, about, e.square().flatten(1).mean(1).sum()])


# ------------------------------------------------------------------------------------------------

def draw_latents(model, y, held, given, noise, steps=250, cfg=1.0, precision="fp32", start="shifted", x_update=None, classifier_scale=0.0):
    """sample.draw_latents for MTDiffusion: all of model.modalities from what is given -> scaled latents (N, M*C, H, W)."""
    C, taken = model.latent_channels, [bool(here) for here in given]
    if any(here and i not in model.conditions for i, here in enumerate(taken)):
        raise InputError(f"{model.modalities[taken.index(True)]} is given; this checkpoint (MT-Diffusion, {model.pair}) takes "
                         + (" and ".join(model.modalities[i] for i in model.conditions) or "no modality") + " as a condition")
    options = dict(steps=steps, cfg=cfg, precision=precision, start=start, x_update=x_update, classifier_scale=classifier_scale, size=held.shape[2:])
    if model.pair == "pair":
        known = given.to(held.device)[1].expand(len(y))
        return torch.cat(model.sample(noise, known, held[:, C:], **options), 1)
    if model.pair == "label":
        return model.sample(noise, y < model.num_classes, y, **options)[0]
    known = torch.full_like(y, model.pair == "masked", dtype=torch.bool)  # MT-Diffusion-X generates from a mask over everything
    return model.sample(noise, known, torch.zeros_like(held) if model.images else None, **options)[0]
