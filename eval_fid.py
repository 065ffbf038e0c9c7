"""Stage 5a: FID, sFID, IS, precision and recall as ADM's evaluator computes them (Tables 1, 2 and 4).

    python eval_fid.py samples/samples.npz VIRTUAL_imagenet256_labeled.npz --json fid.json
    torchrun --nproc_per_node=8 -- eval_fid.py samples val --crop 256 --metrics fid sfid    # folders
    python eval_fid.py val --crop 256 --save-stats val256.npz                           # one's own reference
    python eval_fid.py a b --metrics latent-fd                   # the toy world's, without Inception; not FID
    python eval_fid.py restored truth --metrics lpips psnr --vgg vgg16.pth --lpips-heads vgg.pth   # of pairs

SAMPLES and REF are .npz files (arr_0 uint8 NHWC, and/or mu, sigma, mu_s, sigma_s), folders of pictures, or
files written by --save-stats. Moments are streamed in float64: memory does not grow with the number of
pictures, except for the 8 KB a picture that precision, recall and KID keep. lpips and psnr compare the
pictures of equal names.
"""
import functools
import hashlib
import math
import os
import pathlib
import threading
import zipfile
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from distributed import (all_reduce, bare, barrier, check, check_apart, check_ranges, check_replaced,
                         command_parser, gather, prefetch, reading, run, say, setup, sha256, share,
                         whole_file, write_json)
from images import centre_crop
from modalities import read_rgb
from trees import find_pictures, flat_name, sample_meta, stem_of
from vae import load_vae, timm_model

INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")
IS_CHUNK = 5000   # consecutive pictures of one inception score
NEIGHBOUR = 3     # whose distance is a manifold's radius
SUBSET = 1000     # pictures of one kernel distance


# ------------------------------------------------------------------------------------------------
# The Inception network of 2015-12-05 (TensorFlow's graph). Names follow the released state dict.

class Conv(nn.Module):
    def __init__(self, inner, outer, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outer, eps=0.001)

    def forward(self, x):                        # (N, inner, H, W)
        return F.relu(self.bn(self.conv(x)))     # (N, outer, H', W')


class Mixed(nn.Module):
    """Parallel chains of convolutions and a pooled branch, concatenated.

    chains: each a name and the (width, kernel) of its convolutions, name_1, name_2, ...; with two kernels
    they are two in parallel, name_1a and name_1b. pool: "average" (borders not counted) or "max", both
    followed by branch_pool of the given width; "reduce" is a max pool of stride 2 alone, and each chain ends
    in a stride of 2.
    """

    def __init__(self, inner, chains, pool, width=0):
        super().__init__()
        self.chains, self.pool = [], pool
        for name, *steps in chains:
            channels, chain = inner, []
            for number, (outer, *kernels) in enumerate(steps, 1):
                last = number == len(steps)
                stride, padding = (2, "valid") if pool == "reduce" and last else (1, "same")
                step = f"{name}_{number}" if len(steps) > 1 else name
                names = [step] if len(kernels) == 1 else [f"{step}a", f"{step}b"]
                for module, kernel in zip(names, kernels):
                    self.add_module(module, Conv(channels, outer, kernel, stride, padding))
                chain.append(names)
                channels = outer
            self.chains.append(chain)
        if width:
            self.branch_pool = Conv(inner, width, 1)

    def pooled(self, x):                                                         # (N, inner, H, W)
        if self.pool == "reduce":
            return F.max_pool2d(x, 3, 2)                                         # (N, inner, H/2, W/2)
        if self.pool == "max":
            return self.branch_pool(F.max_pool2d(x, 3, 1, 1))                    # (N, width, H, W)
        return self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))

    def forward(self, x):                                                        # (N, inner, H, W)
        """The branches, concatenated: (N, outer, H, W), half as large in a reduction."""
        outputs = []
        for chain in self.chains:
            parts = [x]
            for names in chain:
                parts = [getattr(self, name)(parts[0]) for name in names]        # each (N, width, H, W)
            outputs += parts
        return torch.cat([*outputs, self.pooled(x)], 1)


def _mixed_5(inner, width):
    chains = [("branch1x1", (64, 1)),
              ("branch5x5", (48, 1), (64, 5)),
              ("branch3x3dbl", (64, 1), (96, 3), (96, 3))]
    return Mixed(inner, chains, "average", width)


def _mixed_6(c):
    row, column = (1, 7), (7, 1)
    chains = [("branch1x1", (192, 1)),
              ("branch7x7", (c, 1), (c, row), (192, column)),
              ("branch7x7dbl", (c, 1), (c, column), (c, row), (c, column), (192, row))]
    return Mixed(768, chains, "average", 192)


def _mixed_7(inner, pool):
    cross = (384, (1, 3), (3, 1))
    chains = [("branch1x1", (320, 1)),
              ("branch3x3", (384, 1), cross),
              ("branch3x3dbl", (448, 1), (384, 3), cross)]
    return Mixed(inner, chains, pool, 192)


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_5(192, 32), _mixed_5(256, 64), _mixed_5(288, 64)
        chains = [("branch3x3", (384, 3)), ("branch3x3dbl", (64, 1), (96, 3), (96, 3))]
        self.Mixed_6a = Mixed(288, chains, "reduce")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_mixed_6, (128, 160, 160, 192))
        chains = [("branch3x3", (192, 1), (320, 3)),
                  ("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3))]
        self.Mixed_7a = Mixed(768, chains, "reduce")
        self.Mixed_7b = _mixed_7(1280, "average")
        self.Mixed_7c = _mixed_7(2048, "max")  # a max pool, as in the released graph
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        """x (N, 3, 299, 299), as a PREPROCESS function returns it -> {pool (N, 2048), spatial (N, 2023),
        logits (N, 1008) without bias}.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))        # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))        # (N, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))   # (N, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                       # (N, 768, 17, 17)
        spatial = self.Mixed_6d.branch1x1(x)[:, :7]                              # (N, 7, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(x))                                      # (N, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                       # (N, 2048, 8, 8)
        pool = x.mean((2, 3))                                                    # (N, 2048)
        spatial = spatial.permute(0, 2, 3, 1).flatten(1)                         # (N, 2023)
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.T}


def tf_resize(x, size=299):
    """TensorFlow 1's bilinear resize: source = i * in / out in float32, no half-pixel centres, no
    antialiasing.

    x (N, 3, H, W) float -> (N, 3, size, size); lerp along x, then along y.
    """
    def taps(n):
        source = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(n / size)
        low = source.long()
        return low, (low + 1).clamp(max=n - 1), source - low

    top, bottom, dy = taps(x.shape[2])
    left, right, dx = taps(x.shape[3])
    x = x[..., left] + (x[..., right] - x[..., left]) * dx           # (N, 3, H, size)
    return x[:, :, top] + (x[:, :, bottom] - x[:, :, top]) * dy[:, None]


def _as_adm(x):
    return (tf_resize(x) - 128) / 128


def _as_pytorch_fid(x):
    return 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1


PREPROCESS = {"adm": _as_adm, "pytorch_fid": _as_pytorch_fid}  # (N, 3, H, W) in [0, 255] -> (N, 3, 299, 299)


# ------------------------------------------------------------------------------------------------
# Networks: network(list of uint8 (H, W, 3)) -> {output: (n, D) float32 on the device}. .keys: the names of
# an output's mean and covariance in statistics files; .id: what it is, for recipes and statistics files.

class Weights(NamedTuple):
    """The networks' weights, and how Inception's pictures are prepared, as the flags of these names."""
    inception: pathlib.Path = None
    preprocess: str = "adm"
    dinov2: pathlib.Path = None
    vae: str = "toy"
    vgg: pathlib.Path = None
    lpips_heads: pathlib.Path = None


class Work(NamedTuple):
    """This process's part, and how many pictures it looks at together."""
    rank: int
    world: int
    device: torch.device
    batch_size: int


def _load(network, path, remedy, prefix=""):
    """The network, which may be of no memory yet, frozen, with a file's weights whose names have the prefix.
    Raises InputError naming the file.
    """
    network = network.to_empty(device="cpu")
    with reading(path, remedy):
        state = bare(torch.load(path, map_location="cpu", weights_only=True))
        state = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
        lost = network.load_state_dict(state, strict=False).missing_keys
    check(not lost, f"{path}: lacks {''.join(lost[:1])}; {remedy}")
    return network.eval().requires_grad_(False)


def _batches(pictures, device):
    """Pictures of one size stack, others go one by one -> iterator of float (n, 3, H, W) in [0, 255]."""
    groups = [pictures] if len({picture.shape for picture in pictures}) == 1 else [[p] for p in pictures]
    for group in groups:
        yield torch.from_numpy(np.stack(group)).to(device).permute(0, 3, 1, 2).float()


class InceptionNetwork:
    """With released weights, downloaded once where no file is given."""

    keys = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}

    def __init__(self, weights, work):
        remedy = f"get {INCEPTION} and pass it with --inception FILE"
        cached = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rsplit("/")[-1]
        path = weights.inception or cached
        if path == cached and not path.is_file() and work.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            with reading(path, f"the download failed; {remedy}"):
                torch.hub.download_url_to_file(INCEPTION, str(path), hash_prefix="6726825d")
        barrier()
        with torch.device("meta"):  # nothing is drawn that the file replaces
            model = Inception()
        self.model = _load(model, path, remedy).to(work.device, memory_format=torch.channels_last)
        self.preprocess, self.device = PREPROCESS[weights.preprocess], work.device
        self.id = dict(preprocess=weights.preprocess, inception_sha256=sha256(path))

    def __call__(self, pictures):
        x = torch.cat([self.preprocess(x) for x in _batches(pictures, self.device)])
        return self.model(x.contiguous(memory_format=torch.channels_last))


class DinoNetwork:
    """DINOv2 ViT-L/14, class token after the final norm, PIL bicubic to 224 px (the protocol of dgm-eval)."""

    keys = {"cls": ("mu_dinov2", "sigma_dinov2")}
    name = "vit_large_patch14_dinov2.lvd142m"

    def __init__(self, weights, work):
        path, device = weights.dinov2, work.device
        model = timm_model(self.name, path, "pass a local file with --dinov2 FILE")
        table = model.pos_embed.detach()                                         # (1, 1 + 37*37, 1024)
        grid = table[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)           # (1, 1024, 37, 37)
        scale = (16 + 0.1) / 37  # the hub model resamples by this factor, not to this size: other points
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")  # (1, 1024, 16, 16)
        model.set_input_size(img_size=224)
        model.pos_embed = nn.Parameter(torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1))
        self.model, self.device = model.to(device).requires_grad_(False), device
        statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.mean, self.std = torch.tensor(statistics, device=device)[..., None, None]  # each (3, 1, 1)
        self.id = dict(dinov2="vitl14", dinov2_sha256=sha256(path) if path else None)

    def __call__(self, pictures):
        images = [Image.fromarray(p).resize((224, 224), Image.Resampling.BICUBIC) for p in pictures]
        x = next(_batches([np.asarray(image) for image in images], self.device))
        return {"cls": self.model((x / 255 - self.mean) / self.std)}


class VaeNetwork:
    """The autoencoder's mean latents, flattened: a Frechet distance for the toy world. It is not FID."""

    keys = {"latent": ("mu_latent", "sigma_latent")}

    def __init__(self, weights, work):
        self.model, self.device, self.shape = load_vae(weights.vae).to(work.device), work.device, None
        self.id = dict(vae=weights.vae, vae_sha256=sha256(self.model.path))

    def __call__(self, pictures):
        self.shape = self.shape or pictures[0].shape  # of both sets: latents of other sizes do not compare
        shapes = {self.shape, *(picture.shape for picture in pictures)}
        factor = self.model.factor
        check(len(shapes) == 1 and not any(side % factor for side in self.shape[:2]),
              f"pictures of shape {' and '.join(map(str, sorted(shapes)))}: the autoencoder needs one size "
              f"for all, a multiple of {factor}; use --crop")
        x = next(_batches(pictures, self.device)) / 127.5 - 1
        return {"latent": self.model.encode(x)[0].flatten(1)}


class Lpips(nn.Module):
    """LPIPS v0.1 with a VGG-16 trunk (Zhang et al. 2018): a, b (N, 3, H, W) in [-1, 1] -> (N,)."""

    keys = {}
    taps = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self, weights, work):
        super().__init__()
        import timm
        remedy = ("lpips needs --vgg FILE (torchvision's vgg16-397923af.pth) and --lpips-heads FILE "
                  "(the lpips release's weights/v0.1/vgg.pth)")
        check(weights.vgg and weights.lpips_heads, remedy)
        heads = nn.ModuleDict()
        for i, width in enumerate((64, 128, 256, 512, 512)):
            model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            heads[f"lin{i}"] = nn.ModuleDict({"model": model})
        self.heads = _load(heads, weights.lpips_heads, remedy).to(work.device)
        with torch.device("meta"):
            trunk = timm.create_model("vgg16", num_classes=0).features
        self.features = _load(trunk, weights.vgg, remedy, "features.").to(work.device)
        self.shift = torch.tensor([-0.030, -0.088, -0.188], device=work.device).view(3, 1, 1)
        self.scale = torch.tensor([0.458, 0.448, 0.450], device=work.device).view(3, 1, 1)
        self.id = dict(lpips="v0.1 vgg", vgg_sha256=sha256(weights.vgg),
                       heads_sha256=sha256(weights.lpips_heads))

    def forward(self, a, b):
        x = (torch.cat([a, b]) - self.shift) / self.scale                        # (2N, 3, H, W)
        distance, heads = 0, iter(self.heads.values())
        for i, layer in enumerate(self.features):
            x = layer(x)                                                         # (2N, c, h, w)
            if i in self.taps:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                p, q = unit.chunk(2)                                             # each (N, c, h, w)
                distance = distance + next(heads)["model"]((p - q).square()).mean((1, 2, 3))
        return distance                                                          # (N,)


NETWORKS = {"inception": InceptionNetwork, "dinov2": DinoNetwork, "vae": VaeNetwork, "vgg": Lpips}


# ------------------------------------------------------------------------------------------------
# Metrics of moments, features and scores.

def frechet(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), float64; the trace from the eigenvalues of R^T S2 R, where
    S1 = R R^T.
    """
    values, vectors = torch.linalg.eigh(sigma1)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]  # the others are rounding
    root = vectors[:, kept] * values[kept].sqrt()  # (D, rank)
    shared = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * shared)


def inception_score(scores, count):
    """The mean over chunks of exp(mean KL(p || mean p)) (Salimans et al. 2016).

    scores (chunks, 1 + classes) float64: the sums over a chunk's pictures of sum(p log p) and of p.
    """
    sizes = torch.bincount(torch.arange(count) // IS_CHUNK).to(scores)
    q = scores[:, 1:] / sizes[:, None]
    return float((scores[:, 0] / sizes - (q * q.log()).nan_to_num(0).sum(1)).exp().mean())


def _squared_distances(a, b, b_norm):
    """a (n, D), b (m, D), |b|^2 (m,) -> (n, m) float32, not negative."""
    return torch.addmm(b_norm, a, b.T, alpha=-2).add_(a.square().sum(1, keepdim=True)).clamp_(min=0)


@functools.lru_cache(maxsize=1)  # precision and recall are asked for one after the other
def precision_recall(samples, reference, k=NEIGHBOUR, elements=2 ** 26):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, D) and (R, D), float32
    -> precision, recall.

    A manifold is the union of the balls that reach each point's k-th neighbour, itself not counted; <= is
    inside. Distances are squared and computed for `elements` pairs at a time; about the mean, where fp32
    loses the least. N and R must be above k.
    """
    centre = reference.mean(0)
    samples, reference = samples - centre, reference - centre
    reference_norm = reference.square().sum(1)

    def radii(x, norm):
        parts = x.split(max(1, elements // len(x)))
        nearest = [_squared_distances(part, x, norm).topk(k + 1, largest=False).values[:, k]
                   for part in tqdm(parts, desc="radii", leave=False)]
        return torch.cat(nearest)

    of_samples, of_reference = radii(samples, samples.square().sum(1)), radii(reference, reference_norm)
    step = max(1, elements // len(reference))
    inside, covered = 0, torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for start in tqdm(range(0, len(samples), step), desc="manifolds", leave=False):
        distance = _squared_distances(samples[start:start + step], reference, reference_norm)
        inside += int((distance <= of_reference).any(1).sum())
        covered |= (distance <= of_samples[start:start + step, None]).any(0)
    return inside / len(samples), float(covered.double().mean())


def precision(samples, reference):
    return precision_recall(samples, reference)[0]


def recall(samples, reference):
    return precision_recall(samples, reference)[1]


def kernel_distance(samples, reference, subsets=100, size=SUBSET, seed=2020):
    """KID (Binkowski et al. 2018): unbiased squared MMD with (x.y / D + 1)^3 over random subsets
    -> {kid: mean, kid_std: standard deviation}.

    The subsets are those that torch-fidelity draws, so that the figures agree. No set may be smaller than
    one.
    """
    random, values = np.random.RandomState(seed), []

    def subset(features):
        rows = random.choice(len(features), size, replace=False)
        return features[torch.from_numpy(rows).to(features.device)].double()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    for _ in range(subsets):
        x, y = subset(samples), subset(reference)
        within = [float(m.sum() - m.diagonal().sum()) for m in (kernel(x, x), kernel(y, y))]
        values.append(sum(within) / (size * (size - 1)) - 2 * float(kernel(x, y).mean()))
    return {"kid": float(np.mean(values)), "kid_std": float(np.std(values))}


# Metrics of a pair of pictures uint8 (H, W, 3) through a network.

def lpips(a, b, network):
    """Learned perceptual distance. Raises InputError for pictures that VGG's poolings leave nothing of."""
    check(min(a.shape[:2]) >= 16, f"a picture of shape {a.shape}: lpips needs at least 16x16")
    a, b = (next(_batches([picture], network.shift.device)) / 127.5 - 1 for picture in (a, b))
    return float(network(a, b))


def psnr(a, b, network=None):
    """Peak signal-to-noise ratio, 10 log10(255^2 / mean squared error) in dB; infinite for equal pictures."""
    error = np.square(a.astype(np.float64) - b).mean()
    return 10 * math.log10(255 ** 2 / error) if error else math.inf


class Metric(NamedTuple):
    """network: what it looks through, of NETWORKS. takes: what it takes of each set of pictures:
    ("moments", output): mu (D,), sigma (D, D); ("features", output): (N, D); ("scores", "logits"): as
    inception_score; or "pairs". compute: those of SAMPLES, then of REF -> a number or {figure: number}; of
    "pairs": two pictures and the network -> a number. alone: of SAMPLES only. least: how many pictures it
    needs of each set.
    """
    network: str | None
    takes: tuple | str
    compute: Callable
    alone: bool = False
    least: int = 1


METRICS = {
    "fid": Metric("inception", ("moments", "pool"), frechet),
    "sfid": Metric("inception", ("moments", "spatial"), frechet),
    "is": Metric("inception", ("scores", "logits"), inception_score, alone=True),
    "precision": Metric("inception", ("features", "pool"), precision, least=NEIGHBOUR + 1),
    "recall": Metric("inception", ("features", "pool"), recall, least=NEIGHBOUR + 1),
    "kid": Metric("inception", ("features", "pool"), kernel_distance, least=SUBSET),
    "fd-dinov2": Metric("dinov2", ("moments", "cls"), frechet),
    "latent-fd": Metric("vae", ("moments", "latent"), frechet),
    "lpips": Metric("vgg", "pairs", lpips),
    "psnr": Metric(None, "pairs", psnr),
}
DEFAULT = ("fid", "sfid", "is", "precision", "recall")


# ------------------------------------------------------------------------------------------------
# Sets of pictures and statistics files.

class Folder:
    """The pictures below a folder, or below its rgb/ (what sample.py writes), read by index.

    Raises InputError for a folder without pictures, and for one that sample.py has not finished.
    """

    def __init__(self, path):
        base = path / "rgb" if (path / "rgb").is_dir() else path
        recipe = meta_near(base)
        check(recipe.get("complete") is not False,
              f"{path}: the set is not complete; finish it with the same sample.py command")
        self.files = find_pictures(base)
        self.names = [stem_of(file, base) for file in self.files]

    def read(self, rows):
        """A range of indices -> list of PIL images in mode RGB."""
        return [read_rgb(self.files[i]) for i in rows]


class Archive:
    """The pictures of an .npz (arr_0, uint8 NHWC), read by index; nothing else is kept in memory.

    Raises InputError for other types and shapes, and where the file is damaged or cut short.
    """

    remedy = "damaged or cut short; make it again"

    def __init__(self, path):
        self.path, self.files, self.lock = path, [path], threading.Lock()
        with reading(f"{path}: arr_0", self.remedy):
            self.file = zipfile.ZipFile(path).open("arr_0.npy")
            version, _ = np.lib.format.read_magic(self.file)
            header = getattr(np.lib.format, f"read_array_header_{version}_0")
            shape, fortran, dtype = header(self.file)
        check(dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and not fortran and all(shape),
              f"{path}: arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3)")
        self.shape, self.start = shape, self.file.tell()
        self.names = [str(i) for i in range(shape[0])]

    def read(self, rows):
        """A range of indices -> list of PIL images in mode RGB."""
        size = math.prod(self.shape[1:])
        with self.lock, reading(self.path, self.remedy):
            self.file.seek(self.start + rows.start * size)
            data = self.file.read(len(rows) * size)
        check(len(data) == len(rows) * size, f"{self.path}: arr_0 is cut short at picture "
              f"{rows.start + len(data) // size} of {len(self.names)}; make it again")
        arrays = np.frombuffer(data, np.uint8).reshape(-1, *self.shape[1:])
        return [Image.fromarray(array) for array in arrays]


class Source(NamedTuple):
    """One set: its pictures (a Folder, an Archive, or None where there are statistics alone), statistics
    {key: array}, and the size of ADM's centre crop or None.
    """
    path: pathlib.Path
    pictures: Folder | Archive | None
    statistics: dict
    crop: int | None

    def read(self, rows):
        """A range of indices -> list of uint8 (H, W, 3)."""
        images = self.pictures.read(rows)
        if self.crop:
            images = [centre_crop(image, self.crop) for image in images]
        return [np.asarray(image) for image in images]


def open_source(path, crop=None):
    """A folder or an .npz -> Source.

    Raises InputError when it is none, holds neither pictures nor moments, or what Folder, Archive and
    _check_moments refuse.
    """
    if path.is_dir():
        return Source(path, Folder(path), {}, crop)
    with reading(path, "give pictures (arr_0), statistics (mu, sigma) or a folder"):
        with np.load(path, allow_pickle=False) as file:
            statistics = {key: file[key] for key in file.files if key != "arr_0"}
            pictures = "arr_0" in file.files
    pairs = [pair for network in NETWORKS.values() for pair in network.keys.values()]
    known = [pair for pair in pairs if statistics.keys() >= set(pair)]
    check(pictures or known,
          f"{path}: holds {', '.join(statistics) or 'nothing'}; expected arr_0, or mu and sigma")
    for pair in known:
        _check_moments(path, *pair, *(statistics[key] for key in pair))
    return Source(path, Archive(path) if pictures else None, statistics, crop)


def _check_moments(path, mean, covariance, mu, sigma):
    check(mu.dtype.kind == sigma.dtype.kind == "f", f"{path}: {mean} and {covariance} are {mu.dtype} and "
          f"{sigma.dtype}, expected floats; make the file again")
    check(mu.ndim == 1 and sigma.shape == (len(mu), len(mu)), f"{path}: {mean} has shape {mu.shape} and "
          f"{covariance} {sigma.shape}; they do not belong together")
    check(np.isfinite(mu).all() and np.isfinite(sigma).all(),
          f"{path}: {mean} or {covariance} holds values that are not finite; make the file again")
    check((sigma.diagonal() >= 0).all(), f"{path}: {covariance} has negative variances; make the file again")


def same_network(source, identity):
    """Raise InputError when a statistics file was made in another mode or with other weights."""
    found = {key: str(value) for key, value in source.statistics.items() if key in identity}
    if "mu" in source.statistics:  # ADM's files carry mu_s, pytorch-fid's do not
        found.setdefault("preprocess", "adm" if "mu_s" in source.statistics else "pytorch_fid")
    for key, value in identity.items():
        stored = found.get(key, str(value))
        remedy = f"pass --preprocess {stored}" if key == "preprocess" else "use the weights that made them"
        check(value is None or stored == str(value), f"{source.path}: its statistics have {key} = "
              f"{stored[:20]}, this run has {str(value)[:20]}; the two never mix: {remedy} or make them anew")


def meta_near(path):
    """meta.json of sample.py in or beside a folder or file of samples; {} where there is none."""
    return sample_meta(path) or sample_meta(path.parent)


def describe(source, count):
    """What a recipe says of one set of pictures: name, number, hash (of a folder's pictures by names and
    sizes), how sample.py made it.
    """
    path = source.path
    if path.is_file():
        digest = sha256(path)
    else:
        files = source.pictures.files
        listing = "".join(f"{file.relative_to(path)} {file.stat().st_size}\n" for file in files)
        digest = hashlib.sha256(os.fsencode(listing)).hexdigest()  # a name need not be UTF-8
    described = dict(name=path.name, count=count, sha256=digest)
    recipe = meta_near(path)
    if recipe:
        lists = ("samples", "outputs", "palette")
        described["sampling"] = {key: value for key, value in recipe.items() if key not in lists}
    return described


# ------------------------------------------------------------------------------------------------
# Sets through networks.

def add_moments(sums, x):
    """Add features (n, D) to the float64 sums (1 + D, D) of x and x x^T, in place."""
    x = x.double()
    sums[0] += x.sum(0)
    sums[1:].addmm_(x.T, x)


def finish_moments(sums, count):
    """The sums over count pictures -> mean (D,) and covariance (D, D), ddof 1."""
    mu = sums[0] / count
    return mu, (sums[1:] - count * torch.outer(mu, mu)) / max(count - 1, 1)


def chunk_scores(logits):
    """Logits (n, classes) -> what an inception score sums: sum(p log p) and p, (n, 1 + classes) float64."""
    log_p = logits.double().log_softmax(1)
    return torch.cat([(log_p.exp() * log_p).sum(1, keepdim=True), log_p.exp()], 1)


@torch.inference_mode()
def extract(source, network, keep, work):
    """A set's pictures through a network, shared out over the processes -> {what a metric takes: its values},
    on every process.

    keep: the outputs of which features are taken, (N, D) float32 in file order. On a CPU the pictures go one
    by one, each by one thread: the order in which a convolution sums depends on the batch and the number of
    threads, and the moments shall not. Raises InputError for features that are not finite.
    """
    names, device = source.pictures.names, work.device
    count, threads = len(names), torch.get_num_threads()
    workers, step = (threads, 1) if device.type == "cpu" else (4, work.batch_size)
    home = device if device.type == "cuda" else torch.device("cpu")  # it has float64

    @torch.inference_mode()
    def look(rows):
        torch.set_num_threads(1)  # in this worker
        block = source.read(rows)
        parts = [network(block[i:i + step]) for i in range(0, len(block), step)]
        return {name: torch.cat([part[name] for part in parts]).to(home) for name in parts[0]}

    # A first look for the widths: a process may have no batch of its own.
    widths = {name: x.shape[1] for name, x in next(prefetch(look, [range(1)])).items()}
    wide = dict(dtype=torch.float64, device=home)
    scores = torch.zeros(-(-count // IS_CHUNK), 1 + widths.pop("logits", 0), **wide)
    sums = {name: torch.zeros(1 + width, width, **wide) for name, width in widths.items()}
    features = {name: torch.zeros(count, widths[name], device=home) for name in keep}
    batches = share(range(count), work.rank, work.world, work.batch_size)
    done = tqdm(prefetch(look, batches, workers, workers + 1), source.path.name, len(batches),
                disable=work.rank > 0, unit="batch")
    for outputs, rows in zip(done, batches):
        for name, x in outputs.items():
            bad = ~torch.isfinite(x).all(1)
            picture = names[rows[int(bad.int().argmax())]]
            check(not bad.any(), f"{source.path}: picture {picture} gives {name} features that are not "
                  "finite; check it and the network's weights")
            if name == "logits":
                scores.index_add_(0, torch.tensor(rows, device=home) // IS_CHUNK, chunk_scores(x))
            else:
                add_moments(sums[name], x)
            if name in keep:
                features[name][rows.start:rows.stop] = x
    torch.set_num_threads(threads)
    known = {("scores", "logits"): (all_reduce(scores), count)}
    for name, total in sums.items():
        known["moments", name] = tuple(x.cpu() for x in finish_moments(all_reduce(total), count))
    for name in keep:
        known["features", name] = (all_reduce(features[name]),)
    return known


class Side(NamedTuple):
    """One set through one network: known {what a metric takes: its values}, how many pictures were looked
    at, and the count that the moments are of; None where there were none, or where the file does not say.
    """
    path: pathlib.Path
    known: dict
    pictures: int | None
    count: int | None


def _lack(row, source):
    """Why a set cannot give what a metric takes, or None."""
    kind, output = row.takes
    if kind == "moments" and source.statistics.keys() >= set(NETWORKS[row.network].keys[output]):
        return None
    if source.pictures is None:
        return f"{source.path} is statistics alone, without {kind} of {output}; give pictures"
    count = len(source.pictures.names)
    return f"needs {row.least} pictures, {source.path} has {count}" if count < row.least else None


def possible(sources, metrics):
    """The metrics of which something can be had, told before any picture is read; what is left out is said.

    Raises InputError where none remains.
    """
    reasons = {}
    for metric in metrics:
        row = METRICS[metric]
        lacks = [_lack(row, source) for source in (sources[:1] if row.alone else sources)]
        if any(lacks):
            reasons[metric] = f"{_figure(metric)}: left out, {next(filter(None, lacks))}"
    check(len(reasons) < len(metrics), "; ".join(reasons.values()))
    for reason in reasons.values():
        say(reason)
    return [metric for metric in metrics if metric not in reasons]


def _figure(metric):
    """A metric's name in the results."""
    return metric.replace("-", "_")


def study(source, network, taken, work):
    """What the metrics take of one set through one network -> Side: moments from its file where they are
    there, the rest from its pictures.
    """
    same_network(source, network.id)
    found = source.statistics
    stored = {("moments", output): tuple(torch.from_numpy(found[key]).double() for key in pair)
              for output, pair in network.keys.items() if found.keys() >= set(pair)}
    needed = not stored or not taken <= stored.keys()
    known, pictures = {}, None
    if source.pictures and needed:
        known = extract(source, network, {output for kind, output in taken if kind == "features"}, work)
        pictures = len(source.pictures.names)
    if not stored:
        return Side(source.path, known, pictures, pictures)
    # As ADM's evaluator: the statistics of the whole set beside a part of its pictures.
    count = int(found["count"]) if "count" in found else None
    return Side(source.path, known | stored, pictures, count)


def study_all(sources, metrics, networks, work):
    """What the metrics take of all sets through all networks -> {network: [Side of SAMPLES, Side of REF]};
    without REF the statistics of SAMPLES.
    """
    sides = {}
    for name, network in networks.items():
        rows = [METRICS[m] for m in metrics if METRICS[m].network == name and len(sources) == 2]
        taken = {row.takes for row in rows}, {row.takes for row in rows if not row.alone}
        sides[name] = [study(source, network, takes, work) for source, takes in zip(sources, taken)]
    return sides


def compare(sides, metrics):
    """The metrics, those that are possible, of {network: [Side of SAMPLES, Side of REF]} -> {figure: number}.

    Raises InputError where dimensions differ.
    """
    figures, deficient = {}, False
    for metric in metrics:
        row = METRICS[metric]
        chosen = sides[row.network][:1] if row.alone else sides[row.network]
        given = [side.known[row.takes] for side in chosen]
        dimensions = [values[0].shape[-1] for values in given]
        check(len(set(dimensions)) == 1, f"{_both(chosen)}: features of {' and '.join(map(str, dimensions))} "
              "dimensions; use pictures of one size and statistics of one kind")
        for side in chosen:
            if row.takes[0] == "moments" and side.count is not None and side.count <= dimensions[0]:
                deficient = True
                print(f"WARNING: rank-deficient covariance: {side.path}: {side.count} pictures for "
                      f"{dimensions[0]} dimensions ({metric}); the distance depends on this number, compare "
                      "equal numbers only")
        value = row.compute(*(x for values in given for x in values))
        figures.update(value if isinstance(value, dict) else {_figure(metric): value})
    return {**figures, "rank_deficient": deficient}


def _both(sets):
    return " and ".join(str(each.path) for each in sets)


def _by_name(source):
    """{name of a picture, as sample.py writes it: its range of one index}"""
    check(source.pictures, f"{source.path}: holds statistics alone; pairs need pictures")
    names = [flat_name(name) for name in source.pictures.names]
    check(len(set(names)) == len(names), f"{source.path}: two pictures of one name; pairs need one of each")
    return {name: range(i, i + 1) for i, name in enumerate(names)}


@torch.inference_mode()
def compare_pairs(sources, metrics, networks, work):
    """The means of metrics over pairs of pictures with equal names -> {figure: number}, None where all are
    infinite; infinite ones are counted and left out; and the two Sides, for a recipe. Raises InputError
    where names or shapes do not pair.
    """
    first, second = (_by_name(source) for source in sources)
    odd = sorted(first.keys() ^ second.keys())
    check(not odd, f"{_both(sources)}: {len(first)} and {len(second)} pictures, {''.join(odd[:1])} only in "
          "one; pictures of equal names are compared")
    rows, values = [METRICS[metric] for metric in metrics], []
    for name in tqdm(list(first)[work.rank::work.world], "pairs", disable=work.rank > 0):
        (a,), (b,) = sources[0].read(first[name]), sources[1].read(second[name])
        check(a.shape == b.shape,
              f"{_both(sources)}: {name} has shapes {a.shape} and {b.shape}; they must be equal")
        values.append([row.compute(a, b, networks.get(row.network)) for row in rows])
    figures = {}
    for metric, *found in zip(metrics, *sum(gather(values), [])):
        check(not any(map(math.isnan, found)), f"{_both(sources)}: {metric} is no number; check the weights")
        finite = [value for value in found if math.isfinite(value)]
        figures[metric] = math.fsum(finite) / len(finite) if finite else None
        if len(finite) < len(found):
            figures[f"{metric}_infinite"] = len(found) - len(finite)
    return figures, [Side(source.path, {}, len(first), len(first)) for source in sources]


def save_statistics(path, sides, networks):
    """The moments of SAMPLES through the networks, under ADM's names, with what made them."""
    count = next(iter(sides.values()))[0].count
    arrays = {} if count is None else {"count": np.array(count)}
    for name, network in networks.items():
        arrays.update({key: np.array(value) for key, value in network.id.items() if value is not None})
        for output, pair in network.keys.items():
            moments = sides[name][0].known.get(("moments", output), ())
            arrays.update({key: moment.numpy() for key, moment in zip(pair, moments)})
    with whole_file(path) as file:
        np.savez(file, **arrays)


# ------------------------------------------------------------------------------------------------

def arguments():
    """The command's flags -> Namespace. InputError for those that contradict each other."""
    parser = command_parser(__doc__)
    add, file = parser.add_argument, dict(type=pathlib.Path, metavar="FILE")
    add("samples", type=pathlib.Path)
    add("reference", type=pathlib.Path, nargs="?", help="may be left out with --save-stats")
    add("--metrics", nargs="+", choices=list(METRICS), default=DEFAULT, help="default: " + " ".join(DEFAULT))
    add("--inception", **file, help="the pytorch-fid release's weights; default: downloaded once")
    add("--dinov2", **file, help="local DINOv2 ViT-L/14 weights instead of the hub's")
    add("--vae", default="toy", help="autoencoder of latent-fd, a distance in its latents; not FID")
    add("--preprocess", choices=list(PREPROCESS), default="adm",
        help="pytorch_fid: figures comparable with that package")
    add("--vgg", **file, help="lpips: torchvision's VGG-16")
    add("--lpips-heads", **file, help="lpips: the release's weights/v0.1/vgg.pth")
    add("--crop", type=int, metavar="SIZE",
        help="ADM's centre crop of every picture first (256 for ImageNet validation)")
    add("--batch-size", type=int, default=64)
    add("--save-stats", **file, help="write the statistics of SAMPLES, usable as REF")
    add("--json", **file)
    args = parser.parse_args()
    paired = [metric for metric in args.metrics if METRICS[metric].takes == "pairs"]
    check(args.reference or (args.save_stats and not paired),
          f"{args.samples}: give REF to compare with, or --save-stats FILE")
    check(not paired or (len(paired) == len(args.metrics) and not args.save_stats),
          f"--metrics {' '.join(args.metrics)}: {' and '.join(paired)} compare pairs of pictures, not sets; "
          "ask for them in a call of their own, without --save-stats")
    check_ranges(args, batch_size=(1, None), crop=(8, None))
    read = (args.samples, args.reference, args.inception, args.dinov2, args.vgg, args.lpips_heads, args.vae)
    check_apart([args.save_stats, args.json], read)
    check_replaced(args.json, b"{", b'"recipe"')
    check_replaced(args.save_stats, b"P")  # of a zip file
    return args


def main():
    """Features of both sets, shared out over the processes, then the metrics asked for; process 0 prints and
    writes them.
    """
    args = arguments()
    work = Work(*setup(), args.batch_size)
    weights = Weights(*(getattr(args, name) for name in Weights._fields))
    sources = [open_source(path, args.crop) for path in (args.samples, args.reference) if path]
    for source in sources:
        beside = [folder / "meta.json" for folder in (source.path, source.path.parent)]
        files_read = source.pictures.files if source.pictures else ()
        check_apart([args.save_stats, args.json], [*files_read, *beside])
    paired = METRICS[args.metrics[0]].takes == "pairs"
    metrics = possible(sources, args.metrics) if args.reference and not paired else args.metrics
    rows = [METRICS[metric] for metric in metrics]
    names = dict.fromkeys(row.network for row in rows)
    networks = {name: NETWORKS[name](weights, work) for name in names if name}
    if paired:
        figures, seen = compare_pairs(sources, metrics, networks, work)
    else:
        sides = study_all(sources, metrics, networks, work)
        seen = sides[rows[0].network]
        if args.save_stats and work.rank == 0:
            save_statistics(args.save_stats, sides, networks)
            print(f"{args.save_stats}: statistics of {args.samples}")
        figures = compare(sides, metrics) if args.reference and work.rank == 0 else {}
        if figures:
            figures = {_figure(metric): None for metric in args.metrics if metric not in metrics} | figures
    if work.rank > 0 or not figures:
        return
    for figure, value in figures.items():
        print(f"{figure:14s} {value:.4f}" if isinstance(value, float) else f"{figure:14s} {value}")
    if args.json:
        samples, reference = seen
        recipe = dict(samples=describe(sources[0], samples.pictures or samples.count),
                      reference=describe(sources[1], reference.count or reference.pictures),
                      metrics=args.metrics, precision="fp32, moments fp64", crop=args.crop)
        for network in networks.values():
            recipe.update(network.id)
        recipe.update(is_chunk=IS_CHUNK, neighbour=NEIGHBOUR, reference_pictures=reference.pictures,
                      torch=torch.__version__, device=work.device.type)
        write_json(args.json, {**figures, "recipe": recipe})


if __name__ == "__main__":
    run(main)
