"""Stage 5a: FID, sFID, IS, precision and recall as ADM's evaluator computes them (Tables 1, 2 and 4).

    python eval_fid.py samples/samples.npz VIRTUAL_imagenet256_labeled.npz --json fid.json
    torchrun --nproc_per_node=8 eval_fid.py samples val --crop 256 --metrics fid sfid   # folders of pictures
    python eval_fid.py val --crop 256 --save-stats val256.npz                               # a reference of one's own
    python eval_fid.py restored truth --lpips --vgg vgg16.pth --lpips-heads vgg.pth         # paired pictures

SAMPLES and REF are .npz files (arr_0 uint8 NHWC, and/or mu, sigma, mu_s, sigma_s), folders of pictures, or files
written by --save-stats. Moments are streamed in float64: memory does not grow with the number of pictures, except
for the 8 KB a picture that precision, recall and KID keep.
"""
import argparse
import concurrent.futures
import hashlib
import json
import pathlib
import threading
import urllib.error
import zipfile
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from distributed import InputError, all_reduce, barrier, run, setup, whole_file
from prep_latents import EXTENSIONS, centre_crop, read_picture
from vae import load_vae, sha256

INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
IS_CHUNK = 5000   # consecutive pictures of one inception score
NEIGHBOUR = 3     # whose distance is a manifold's radius
KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "latent": ("mu_latent", "sigma_latent"), "cls": ("mu_dinov2", "sigma_dinov2")}
METRICS = {"fid": "inception", "sfid": "inception", "is": "inception", "precision": "inception", "recall": "inception",
           "kid": "inception", "fd-dinov2": "dinov2", "latent-fd": "vae"}  # and the network that each looks through


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

    chains: each a list of (name, width, kernel[, stride]); where the last entry is a list, its convolutions run in
    parallel. pool: "average" (borders not counted) or "max", both followed by branch_pool of the given width; "reduce"
    is a max pool of stride 2 alone. A stride of 2 goes without padding.
    """

    def __init__(self, inner, chains, pool, width=0):
        super().__init__()
        self.chains, self.pool = [], pool
        for chain in chains:
            names, channels = [], inner
            for entry in chain:
                parallel = entry if isinstance(entry, list) else [entry]
                for name, outer, kernel, *stride in parallel:
                    padding = 0 if stride else tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
                    self.add_module(name, Conv(channels, outer, kernel, *stride or (1,), padding))
                names.append([p[0] for p in parallel])
                channels = outer
            self.chains.append(names)
        if width:
            self.branch_pool = Conv(inner, width, 1)

    def forward(self, x):                                                               # (N, inner, H, W)
        """A block of parallel branches, concatenated: (N, inner, H, W) -> (N, outer, H, W), half as large in a reduction."""
        outputs = []
        for chain in self.chains:
            parts = [x]
            for names in chain:
                parts = [getattr(self, name)(parts[0]) for name in names]               # each (N, outer, H, W)
            outputs += parts
        if self.pool == "reduce":
            outputs.append(F.max_pool2d(x, 3, 2))                                       # (N, inner, H/2, W/2)
        elif self.pool == "max":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))                  # (N, width, H, W)
        else:
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        return torch.cat(outputs, 1)


def _mixed_5(inner, width):
    return Mixed(inner, [[("branch1x1", 64, 1)], [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
                         [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]], "average", width)


def _mixed_6(c):
    return Mixed(768, [[("branch1x1", 192, 1)], [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
                       [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
                        ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))]], "average", 192)


def _mixed_7(inner, pool):
    pair = lambda stem, a, b: [(f"{stem}{a}", 384, (1, 3)), (f"{stem}{b}", 384, (3, 1))]
    return Mixed(inner, [[("branch1x1", 320, 1)], [("branch3x3_1", 384, 1), pair("branch3x3_2", "a", "b")],
                         [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), pair("branch3x3dbl_3", "a", "b")]], pool, 192)


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_5(192, 32), _mixed_5(256, 64), _mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, [[("branch3x3", 384, 3, 2)], [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)]], "reduce")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_mixed_6(c) for c in (128, 160, 160, 192))
        self.Mixed_7a = Mixed(768, [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
                                    [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
                                     ("branch7x7x3_4", 192, 3, 2)]], "reduce")
        self.Mixed_7b, self.Mixed_7c = _mixed_7(1280, "average"), _mixed_7(2048, "max")  # a max pool, as in the released graph
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        """x (N, 3, 299, 299), as a PREPROCESS function returns it -> pool (N, 2048), spatial (N, 2023), logits (N, 1008) without bias."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))              # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))              # (N, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))         # (N, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                             # (N, 768, 17, 17)
        spatial = self.Mixed_6d.branch1x1(x)[:, :7]                                    # (N, 7, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(x))                                            # (N, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                             # (N, 2048, 8, 8)
        pool = x.mean((2, 3))                                                          # (N, 2048)
        return {"pool": pool, "spatial": spatial.permute(0, 2, 3, 1).flatten(1), "logits": pool @ self.fc.weight.T}


def tf_resize(x, size=299):
    """TensorFlow 1's bilinear resize: source = i * in / out in float32, no half-pixel centres, no antialiasing.

    x (N, 3, H, W) float -> (N, 3, size, size); lerp along x, then along y.
    """
    def taps(n):
        source = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(n / size, dtype=torch.float32)
        low = source.long()
        return low, (low + 1).clamp(max=n - 1), source - low
    (top, bottom, dy), (left, right, dx) = taps(x.shape[2]), taps(x.shape[3])
    x = x[..., left] + (x[..., right] - x[..., left]) * dx           # (N, 3, H, size)
    return x[:, :, top] + (x[:, :, bottom] - x[:, :, top]) * dy[:, None]


PREPROCESS = {  # floats (N, 3, H, W) in [0, 255] -> (N, 3, 299, 299)
    "adm": lambda x: (tf_resize(x) - 128) / 128,
    "pytorch_fid": lambda x: 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1,
}


# ------------------------------------------------------------------------------------------------
# Networks: network(list of uint8 (H, W, 3)) -> {output: (n, D) float32 on the device}; .id says what it is.

def _load(path, what):
    """A state dict of tensors. Raises InputError naming the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {k: v for k, v in state.items() if torch.is_tensor(v)}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {what}")
    except Exception as error:  # torch's loader raises many kinds for a damaged or foreign file
        raise InputError(f"{path}: not a readable state dict ({type(error).__name__}); {what}")


def _fill(network, state, path, what):
    lost = [k for k in network.state_dict() if k not in state and "num_batches" not in k]
    odd = [k for k in network.state_dict() if k in state and state[k].shape != network.state_dict()[k].shape]
    if lost or odd:
        found = f"lacks {lost[0]}" if lost else f"{odd[0]} has shape {tuple(state[odd[0]].shape)}"
        raise InputError(f"{path}: {found}; {what}")
    network.load_state_dict(state, strict=False)
    return network.eval().requires_grad_(False)


def _batches(pictures, device):
    """Pictures of one size stack, others go one by one -> iterator of float (n, 3, H, W) in [0, 255]."""
    groups = [np.stack(pictures)] if len({p.shape for p in pictures}) == 1 else [p[None] for p in pictures]
    for group in groups:
        yield torch.from_numpy(group).to(device).permute(0, 3, 1, 2).float()


class InceptionNetwork:
    def __init__(self, args, rank, device):
        what = f"get {INCEPTION} and pass it with --inception FILE"
        path = args.inception or pathlib.Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rsplit("/")[-1]
        if args.inception is None and not path.is_file() and rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(INCEPTION, str(path), hash_prefix="6726825d")
            except (urllib.error.URLError, OSError, RuntimeError) as error:
                raise InputError(f"{path}: no such file, and the download failed ({error}); {what}")
        barrier()
        self.model = _fill(Inception(), _load(path, what), path, what).to(device, memory_format=torch.channels_last)
        self.preprocess, self.device = PREPROCESS[args.preprocess], device
        self.id = dict(preprocess=args.preprocess, inception_sha256=sha256(path))

    def __call__(self, pictures):
        x = torch.cat([self.preprocess(x) for x in _batches(pictures, self.device)])
        return self.model(x.contiguous(memory_format=torch.channels_last))


class DinoNetwork:
    """DINOv2 ViT-L/14, class token after the final norm, PIL bicubic to 224 px (the protocol of dgm-eval)."""

    def __init__(self, args, rank, device):
        import timm
        overlay = dict(file=str(args.dinov2)) if args.dinov2 else None
        try:
            self.model = timm.create_model("vit_large_patch14_dinov2.lvd142m", pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
        except Exception as error:  # hub, file and network errors of many kinds
            raise InputError(f"DINOv2 weights: {type(error).__name__} for {args.dinov2 or 'timm/vit_large_patch14_dinov2.lvd142m'}; pass a local file with --dinov2 FILE")
        table = self.model.pos_embed.detach()                                         # (1, 1 + 37*37, 1024)
        grid = table[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)                # (1, 1024, 37, 37)
        scale = (16 + 0.1) / 37  # the hub model resamples by this factor, not to this size: other sampling points
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")       # (1, 1024, 16, 16)
        self.model.set_input_size(img_size=224)
        self.model.pos_embed = nn.Parameter(torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1))
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        self.device, self.id = device, dict(dinov2="vitl14", dinov2_sha256=sha256(args.dinov2) if args.dinov2 else None)

    def __call__(self, pictures):
        small = [np.asarray(Image.fromarray(p).resize((224, 224), Image.Resampling.BICUBIC)) for p in pictures]
        x = next(_batches(small, self.device))
        return {"cls": self.model((x / 255 - self.mean) / self.std)}


class VaeNetwork:
    """The autoencoder's mean latents, flattened: a Frechet distance for the toy world. It is not FID."""

    def __init__(self, args, rank, device):
        self.model, self.device, self.shape = load_vae(args.vae).to(device), device, None
        self.id = dict(vae=args.vae, vae_sha256=sha256(self.model.path))

    def __call__(self, pictures):
        self.shape = self.shape or pictures[0].shape  # of both sets: latents of other sizes do not compare
        if len(shapes := {self.shape, *(p.shape for p in pictures)}) > 1 or any(s % self.model.factor for s in pictures[0].shape[:2]):
            raise InputError(f"pictures of shape {' and '.join(map(str, sorted(shapes)))}: the autoencoder needs one size for all, a multiple of {self.model.factor}; use --crop")
        return {"latent": self.model.encode(next(_batches(pictures, self.device)) / 127.5 - 1)[0].flatten(1)}


NETWORKS = {"inception": InceptionNetwork, "dinov2": DinoNetwork, "vae": VaeNetwork}


# ------------------------------------------------------------------------------------------------
# Pictures and statistics files.

class Pictures:
    """The uint8 pictures of an .npz (arr_0, NHWC) or a folder, read by index; nothing else is kept in memory.

    Raises InputError for empty folders, other array types and shapes, and files that are cut short.
    """

    def __init__(self, path, crop=None):
        self.path, self.crop, self.file = pathlib.Path(path), crop, None
        if self.path.is_dir():
            if (self.path / "rgb").is_dir():  # what sample.py wrote
                self.path = self.path / "rgb"
            if (meta := sampling(self.path)) and meta.get("complete") is False:
                raise InputError(f"{path}: the set is not complete; finish it with the same sample.py command")
            self.files = [p for p in sorted(self.path.rglob("*")) if p.suffix.lower() in EXTENSIONS and p.suffix != ".npy" and p.is_file()]
            if not self.files:
                raise InputError(f"{path}: no pictures in this folder")
            self.names = [p.relative_to(self.path).with_suffix("").as_posix() for p in self.files]
            return
        self.file, self.lock = zipfile.ZipFile(self.path).open("arr_0.npy"), threading.Lock()  # KeyError: holds no pictures
        try:
            version = np.lib.format.read_magic(self.file)
            shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(self.file)
        except Exception as error:  # numpy and zipfile raise many kinds for a foreign or damaged file
            raise InputError(f"{path}: arr_0 is not readable ({type(error).__name__}: {str(error)[:80]}); make it again")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or not all(shape):
            raise InputError(f"{path}: arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3)")
        self.shape, self.start = shape, self.file.tell()
        self.names = [str(i) for i in range(shape[0])]

    def __len__(self):
        return len(self.names)

    def read(self, rows):
        """A range of indices -> list of uint8 (H, W, 3)."""
        if self.file is None:
            pictures = [read_picture(self.files[i]) for i in rows]
            pictures = [Image.fromarray((np.asarray(p) * 255).round().astype(np.uint8)) if p.mode == "F" else p for p in pictures]  # 16 bits
            pictures = [p.convert("RGB") for p in pictures]
        else:
            length = int(np.prod(self.shape[1:]))
            with self.lock:
                try:
                    self.file.seek(self.start + rows.start * length)
                    data = self.file.read(len(rows) * length)
                except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
                    raise InputError(f"{self.path}: damaged or cut short ({error}); make it again")
            if len(data) < len(rows) * length:
                raise InputError(f"{self.path}: arr_0 is cut short at picture {rows.start + len(data) // length} of {len(self)}; make it again")
            pictures = list(np.frombuffer(data, np.uint8).reshape(len(rows), *self.shape[1:]))
        if self.crop:
            pictures = [centre_crop(p if isinstance(p, Image.Image) else Image.fromarray(p), self.crop) for p in pictures]
        return [np.asarray(p) for p in pictures]


def read_statistics(path):
    """The arrays of an .npz other than pictures, {} when it holds pictures alone.

    Raises InputError when the file is none, holds neither pictures nor moments, or moments that are not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {k: file[k] for k in file.files if k != "arr_0"}
            pictures = "arr_0" in file.files
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder")
    except Exception as error:  # numpy and zipfile raise many kinds for a foreign or damaged file
        raise InputError(f"{path}: not a readable .npz ({str(error)[:100]}); give pictures (arr_0), statistics (mu, sigma) or a folder")
    known = [pair for pair in KEYS.values() if all(k in found for k in pair)]
    if not pictures and not known:
        raise InputError(f"{path}: holds {', '.join(found) or 'nothing'}; expected arr_0, or mu and sigma")
    for mean, covariance in known:
        mu, sigma = found[mean], found[covariance]
        if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
            raise InputError(f"{path}: {mean} and {covariance} are {mu.dtype} and {sigma.dtype}, expected floats; make the file again")
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise InputError(f"{path}: {mean} has shape {mu.shape} and {covariance} {sigma.shape}; they do not belong together")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise InputError(f"{path}: {mean} or {covariance} holds values that are not finite; make the file again")
        if (sigma.diagonal() < 0).any():
            raise InputError(f"{path}: {covariance} has negative variances; make the file again")
    return found


class Side:
    """What is known of one set of pictures: count, moments {output: (mu, sigma)}, features or None, inception score or None."""

    def __init__(self, path):
        self.path, self.count, self.moments, self.features, self.inception_score = path, None, {}, None, None


def same_network(path, found, identity):
    """Raise InputError when a statistics file was made in another mode or with other weights."""
    for key, value in identity.items():
        stored = str(found[key]) if key in found else None
        if key == "preprocess" and stored is None and "mu" in found:  # ADM's files carry mu_s, pytorch-fid's do not
            stored = "adm" if "mu_s" in found else "pytorch_fid"
        if stored is not None and value is not None and stored != str(value):
            remedy = f"pass --preprocess {stored}" if key == "preprocess" else "use the weights that made them"
            raise InputError(f"{path}: its statistics have {key} = {stored[:20]}, this run has {str(value)[:20]}; the two never mix: {remedy} or make them again")


def add_moments(sums, x):
    """Add features (n, D) to the float64 sums (1 + D, D) of x and x x^T, in place."""
    x = x.double()
    sums[0] += x.sum(0)
    sums[1:].addmm_(x.T, x)


def finish_moments(sums, count):
    """The sums over count pictures -> mean (D,) and covariance (D, D), ddof 1."""
    mu = sums[0] / count
    return mu, (sums[1:] - count * torch.outer(mu, mu)) / max(count - 1, 1)


@torch.inference_mode()
def extract(path, pictures, network, keep, batch_size, rank, world, device):
    """Run the pictures through the network, shared out over the processes -> Side.

    Moments: sums of x and x x^T in float64 (ddof 1). Inception score per chunk of 5000 in file order, from the sums of
    p log p and of p. keep: features (N, 2048) float32, in file order, are gathered on every process.
    On a CPU the pictures go one by one, each by one thread: the order in which a convolution sums depends on the batch
    and the number of threads, and the moments shall not.
    """
    n, home = len(pictures), device if device.type == "cuda" else torch.device("cpu")
    side, sums, scores = Side(path), {}, torch.zeros(-(-n // IS_CHUNK), 1 + 1008, dtype=torch.float64, device=home)
    side.count = n
    blocks = [range(s, min(s + batch_size, n)) for s in range(0, n, batch_size)][rank::world]
    threads = torch.get_num_threads()
    workers, step = (threads, 1) if device.type == "cpu" else (4, batch_size)

    @torch.inference_mode()
    def look(rows):
        block = pictures.read(rows)
        parts = [network(block[i:i + step]) for i in range(0, len(block), step)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    with concurrent.futures.ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool, tqdm(total=n, desc=pathlib.Path(path).name, disable=rank > 0) as bar:
        ahead = [pool.submit(look, rows) for rows in blocks[:workers + 1]]
        for k, rows in enumerate(blocks):
            outputs = ahead.pop(0).result()
            ahead += [pool.submit(look, blocks[k + workers + 1])] if k + workers + 1 < len(blocks) else []
            for name, x in outputs.items():
                if not torch.isfinite(x).all():
                    row = rows.start + int((~torch.isfinite(x)).any(1).nonzero()[0])
                    raise InputError(f"{path}: picture {pictures.names[row]} gives {name} features that are not finite; check it and the network's weights")
            logits = outputs.pop("logits", None)
            if logits is not None:
                log_p, chunk = logits.to(home).double().log_softmax(1), torch.tensor(rows, device=home) // IS_CHUNK
                scores.index_add_(0, chunk, torch.cat([(log_p.exp() * log_p).sum(1, keepdim=True), log_p.exp()], 1))
            for name, x in outputs.items():
                add_moments(sums.setdefault(name, torch.zeros(1 + x.shape[1], x.shape[1], dtype=torch.float64, device=home)), x.to(home))
            if keep:
                if side.features is None:
                    side.features = torch.zeros(n, outputs["pool"].shape[1], device=home)
                side.features[rows.start:rows.stop] = outputs["pool"].to(home)
            bar.update(len(rows) * world)
    torch.set_num_threads(threads)
    if not blocks:  # more processes than blocks: the shapes come from a picture that does not count
        outputs = look(range(1))
        sums = {name: torch.zeros(1 + x.shape[1], x.shape[1], dtype=torch.float64, device=home) for name, x in outputs.items() if name != "logits"}
        side.features = torch.zeros(n, 2048, device=home) if keep else None
    for name, total in sums.items():
        side.moments[name] = tuple(m.cpu() for m in finish_moments(all_reduce(total), n))
    if keep:
        all_reduce(side.features)
    all_reduce(scores)
    if "pool" in sums:
        sizes = torch.tensor([min(IS_CHUNK, n - s) for s in range(0, n, IS_CHUNK)], dtype=torch.float64, device=home)
        q = scores[:, 1:] / sizes[:, None]
        side.inception_score = float((scores[:, 0] / sizes - (q * q.log()).nan_to_num(0).sum(1)).exp().mean())
    return side


# ------------------------------------------------------------------------------------------------
# Metrics of moments and features.

def frechet(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), float64; the trace from the eigenvalues of S1^1/2 S2 S1^1/2."""
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * shared)


def _squared_distances(a, b, b_norm):
    """a (n, D), b (m, D), |b|^2 (m,) -> (n, m) float32, not negative."""
    return torch.addmm(b_norm, a, b.T, alpha=-2).add_(a.square().sum(1, keepdim=True)).clamp_(min=0)


def precision_recall(samples, reference, k=NEIGHBOUR, elements=2 ** 26):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, D) and (R, D), float32 -> precision, recall.

    A manifold is the union of the balls that reach each point's k-th neighbour, itself not counted; <= is inside.
    Distances are squared and computed for `elements` pairs at a time; about the mean, where fp32 loses the least.
    """
    centre = reference.mean(0)
    samples, reference = samples - centre, reference - centre
    norms = [x.square().sum(1) for x in (samples, reference)]

    def radii(x, norm):
        parts = x.split(max(1, elements // len(x)))
        return torch.cat([_squared_distances(part, x, norm).topk(k + 1, largest=False).values[:, k] for part in
                          tqdm(parts, desc="radii", leave=False)])

    if min(len(samples), len(reference)) <= k:
        raise InputError(f"precision and recall need more than {k} pictures on each side, got {len(samples)} and {len(reference)}")
    of_samples, of_reference = radii(samples, norms[0]), radii(reference, norms[1])
    step = max(1, elements // len(reference))
    inside, covered = 0, torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for start in tqdm(range(0, len(samples), step), desc="manifolds", leave=False):
        distance = _squared_distances(samples[start:start + step], reference, norms[1])
        inside += int((distance <= of_reference).any(1).sum())
        covered |= (distance <= of_samples[start:start + step, None]).any(0)
    return inside / len(samples), float(covered.double().mean())


def kernel_distance(samples, reference, subsets=100, size=1000, seed=2020):
    """KID (Binkowski et al. 2018): unbiased squared MMD with (x.y / D + 1)^3 over random subsets -> mean, standard deviation.

    The subsets are those that torch-fidelity draws, so that the figures agree.
    """
    if min(len(samples), len(reference)) < size:
        raise InputError(f"KID needs {size} pictures on each side, got {len(samples)} and {len(reference)}")
    random, values = np.random.RandomState(seed), []
    samples, reference = samples.double(), reference.double()
    for _ in range(subsets):
        x, y = (f[torch.from_numpy(random.choice(len(f), size, replace=False)).to(f.device)] for f in (samples, reference))
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = sum(float(m.sum() - m.diagonal().sum()) for m in (xx, yy)) / (size * (size - 1))
        values.append(within - 2 * float(xy.mean()))
    return float(np.mean(values)), float(np.std(values))


# ------------------------------------------------------------------------------------------------

class Lpips(nn.Module):
    """LPIPS v0.1 with a VGG-16 trunk (Zhang et al. 2018): a, b (N, 3, H, W) in [-1, 1] -> (N,)."""

    TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self, trunk, heads):
        super().__init__()
        import timm
        what = "--vgg takes torchvision's VGG-16 (vgg16-397923af.pth), --lpips-heads the lpips release's weights/v0.1/vgg.pth"
        state = {k[len("features."):]: v for k, v in _load(trunk, what).items() if k.startswith("features.")}
        self.features = _fill(timm.create_model("vgg16", num_classes=0).features, state, trunk, what)
        heads_state = _load(heads, what)
        for i, width in enumerate((64, 128, 256, 512, 512)):
            weight = heads_state.get(f"lin{i}.model.1.weight")
            if weight is None or weight.shape != (1, width, 1, 1):
                raise InputError(f"{heads}: no lin{i}.model.1.weight of shape (1, {width}, 1, 1); {what}")
            self.register_buffer(f"head{i}", weight)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    def forward(self, a, b):
        x, distance = (torch.cat([a, b]) - self.shift) / self.scale, 0                 # (2N, 3, H, W)
        for i, layer in enumerate(self.features):
            x = layer(x)                                                               # (2N, c, h, w)
            if i in self.TAPS:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                p, q = unit.chunk(2)                                                   # each (N, c, h, w)
                distance = distance + F.conv2d((p - q).square(), getattr(self, f"head{self.TAPS.index(i)}")).mean((1, 2, 3))
        return distance                                                                # (N,)


@torch.inference_mode()
def paired_lpips(args, rank, world, device):
    """The mean LPIPS of pictures with equal names, "/" as "_" as sample.py writes it -> result dict."""
    if not (args.vgg and args.lpips_heads):
        raise InputError("--lpips needs --vgg FILE (torchvision's vgg16-397923af.pth) and --lpips-heads FILE (the lpips release's weights/v0.1/vgg.pth)")
    a, b = (open_pictures(path, args.crop) for path in (args.samples, args.reference))
    if a is None or b is None:
        raise InputError(f"{args.samples if a is None else args.reference}: holds statistics alone; LPIPS needs pictures")
    a.names, b.names = ([name.replace("/", "_") for name in p.names] for p in (a, b))
    if sorted(a.names) != sorted(b.names):
        odd = sorted(set(a.names) ^ set(b.names))
        raise InputError(f"{a.path} and {b.path}: {len(a)} and {len(b)} pictures, {odd[0] if odd else ''} only in one; LPIPS compares pictures of equal names")
    model, total = Lpips(args.vgg, args.lpips_heads).to(device), torch.zeros(1, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    place = {name: i for i, name in enumerate(b.names)}
    for i in tqdm(range(rank, len(a), world), desc="lpips", disable=rank > 0):
        pair = [p.read(range(k, k + 1))[0] for p, k in ((a, i), (b, place[a.names[i]]))]
        if pair[0].shape != pair[1].shape or min(pair[0].shape[:2]) < 16:
            raise InputError(f"{a.path} and {b.path}: {a.names[i]} has shapes {pair[0].shape} and {pair[1].shape}; they must be equal and at least 16x16")
        total += model(*(next(_batches([p], device)) / 127.5 - 1 for p in pair)).sum()
    return dict(lpips=float(all_reduce(total)) / len(a),
                recipe=dict(samples=describe(args.samples, len(a)), reference=describe(args.reference, len(b)), lpips="v0.1 vgg",
                            vgg_sha256=sha256(args.vgg), heads_sha256=sha256(args.lpips_heads), crop=args.crop, torch=torch.__version__))


# ------------------------------------------------------------------------------------------------

def open_pictures(path, crop):
    """Pictures of a folder or an .npz; None of a file of statistics alone. Raises InputError as Pictures and read_statistics do."""
    if not pathlib.Path(path).is_dir():
        read_statistics(path)  # says what is wrong with the file, if anything
    try:
        return Pictures(path, crop)
    except KeyError:
        return None
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: no readable pictures ({error})")


def sampling(path):
    """meta.json of sample.py in or beside a folder or file of samples; None where there is none."""
    for meta in (path / "meta.json", path.parent / "meta.json"):
        try:
            recipe = json.loads(meta.read_text())
            return recipe if "checkpoint_sha256" in recipe else None
        except (OSError, ValueError, TypeError):
            pass  # none, or somebody else's file of that name
    return None


def describe(path, count):
    """What a recipe says of one set of pictures: name, number, hash (of a folder's names and sizes), how sample.py made it."""
    path = pathlib.Path(path)
    listing = "".join(f"{p.relative_to(path)} {p.stat().st_size}\n" for p in sorted(path.rglob("*")) if p.is_file())
    out = dict(name=path.name, count=count, sha256=sha256(path) if path.is_file() else hashlib.sha256(listing.encode()).hexdigest())
    recipe = sampling(path)
    return {**out, "sampling": {k: v for k, v in recipe.items() if k not in ("samples", "outputs", "palette")}} if recipe else out


def study(path, name, network, wanted, args, rank, world, device):
    """One side through one network: its statistics from the file where they are there, else from its pictures."""
    found = {} if pathlib.Path(path).is_dir() else read_statistics(path)
    same_network(path, found, network.id)
    outputs = {"inception": ("pool", "spatial"), "dinov2": ("cls",), "vae": ("latent",)}[name]
    stored = {o: tuple(torch.from_numpy(found[k]).double() for k in KEYS[o]) for o in outputs if all(k in found for k in KEYS[o])}
    features = any(m in wanted for m in ("precision", "recall", "kid"))
    scored = "is" in wanted and path == args.samples
    pictures = open_pictures(path, args.crop)
    if pictures is not None and (features or scored or not stored):
        side = extract(path, pictures, network, features and name == "inception", args.batch_size, rank, world, device)
    else:
        side = Side(path)
    side.pictures = side.count
    if stored:  # as ADM's evaluator: the statistics of the whole set beside a part of its pictures
        side.moments.update(stored)
        side.count = int(found["count"]) if "count" in found else None
    return side


def compare(samples, reference, wanted, rank_deficient):
    """The wanted metrics of two Sides through one network -> dict; None where a side cannot give what it takes."""
    out = {}
    for metric, output in (("fid", "pool"), ("sfid", "spatial"), ("fd-dinov2", "cls"), ("latent-fd", "latent")):
        if metric in wanted:
            pair = [side.moments.get(output) for side in (samples, reference)]
            if None in pair:
                out[metric.replace("-", "_")] = None
                continue
            if pair[0][0].shape != pair[1][0].shape:
                raise InputError(f"{samples.path} and {reference.path}: {output} features of {len(pair[0][0])} and {len(pair[1][0])} dimensions; "
                                 "use pictures of one size and statistics of one kind")
            for side, (mu, _) in zip((samples, reference), pair):
                if side.count is not None and side.count <= len(mu):
                    rank_deficient.append(f"{side.path}: {side.count} pictures for {len(mu)} dimensions ({metric})")
            out[metric.replace("-", "_")] = frechet(*pair[0], *pair[1])
    if "is" in wanted:
        out["is"] = samples.inception_score
    features = (samples.features, reference.features)
    if "precision" in wanted or "recall" in wanted:
        precision, recall = precision_recall(*features) if None not in features else (None, None)
        out.update({k: v for k, v in (("precision", precision), ("recall", recall)) if k in wanted})
    if "kid" in wanted:
        out["kid"], out["kid_std"] = kernel_distance(*features) if None not in features else (None, None)
    return out


def save_statistics(path, sides, networks):
    """The moments of one set through its networks, under ADM's names, with what made them."""
    count = next(iter(sides.values())).count
    arrays = {"count": np.array(count)} if count is not None else {}
    for name, side in sides.items():
        arrays.update({k: np.array(v) for k, v in networks[name].id.items() if v is not None})
        for output, moments in side.moments.items():
            arrays.update({k: m.numpy() for k, m in zip(KEYS[output], moments)})
    with whole_file(path) as file:
        np.savez(file, **arrays)


def arguments():
    """The command's flags -> Namespace. InputError for those that contradict each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=pathlib.Path)
    parser.add_argument("reference", type=pathlib.Path, nargs="?", help="may be left out with --save-stats")
    parser.add_argument("--metrics", nargs="+", choices=list(METRICS), help="default: fid sfid is precision recall")
    parser.add_argument("--features", choices=("inception", "vae"), default="inception", help="vae: latent-fd, a distance in the autoencoder's latents; not FID")
    parser.add_argument("--inception", type=pathlib.Path, metavar="FILE", help="the pytorch-fid release's weights; default: downloaded once")
    parser.add_argument("--dinov2", type=pathlib.Path, metavar="FILE", help="local DINOv2 ViT-L/14 weights instead of the hub's")
    parser.add_argument("--vae", default="toy", help="autoencoder of latent-fd")
    parser.add_argument("--preprocess", choices=list(PREPROCESS), default="adm", help="pytorch_fid: figures comparable with that package")
    parser.add_argument("--crop", type=int, metavar="SIZE", help="ADM's centre crop of every picture first (256 for ImageNet validation)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--save-stats", type=pathlib.Path, metavar="FILE", help="write the statistics of SAMPLES, usable as REF")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--lpips", action="store_true", help="the mean LPIPS of SAMPLES and REF, paired by name, instead")
    parser.add_argument("--vgg", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--lpips-heads", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args()
    if args.reference is None and (args.lpips or not args.save_stats):
        raise InputError(f"{args.samples}: give REF to compare with, or --save-stats FILE")
    if args.batch_size < 1 or (args.crop is not None and args.crop < 8):
        raise InputError(f"--batch-size {args.batch_size} --crop {args.crop}: at least 1, at least 8")
    args.metrics = args.metrics or (["latent-fd"] if args.features == "vae" else ["fid", "sfid", "is", "precision", "recall"])
    if args.features == "vae" and args.metrics != ["latent-fd"]:
        raise InputError(f"--features vae --metrics {' '.join(args.metrics)}: the autoencoder's latents give latent-fd alone")
    return args


def main():
    """Features of both sets, shared out over the processes, then the metrics asked for; rank 0 prints and writes them."""
    args = arguments()
    rank, world, device = setup()
    if args.lpips:
        result = paired_lpips(args, rank, world, device)
    else:
        result = distances(args, rank, world, device)
    if rank > 0 or result is None:
        return
    for key, value in result.items():
        if key != "recipe":
            print(f"{key:14s} {value:.4f}" if isinstance(value, float) else f"{key:14s} {value}")
    if args.json:
        with whole_file(args.json) as file:
            file.write(json.dumps(result, indent=1).encode())


def distances(args, rank, world, device):
    """All wanted metrics of SAMPLES against REF -> result dict on process 0."""
    result, networks, sides, deficient = {}, {}, {}, []
    references = {}
    for name in dict.fromkeys(METRICS[m] for m in args.metrics):
        networks[name] = NETWORKS[name](args, rank, device)
        wanted = [m for m in args.metrics if METRICS[m] == name]
        sides[name] = study(args.samples, name, networks[name], wanted if args.reference else [], args, rank, world, device)
        if args.reference:
            references[name] = study(args.reference, name, networks[name], wanted, args, rank, world, device)
            if rank == 0:
                result.update(compare(sides[name], references[name], wanted, deficient))
    if rank > 0:
        return None
    if args.save_stats:
        save_statistics(args.save_stats, sides, networks)
        print(f"{args.save_stats}: statistics of {args.samples}")
    if not args.reference:
        return None
    for line in deficient:
        print(f"WARNING: rank-deficient covariance: {line}; the distance depends on this number, compare equal numbers only")
    if not any(value is not None for value in result.values()):
        raise InputError(f"{args.samples} and {args.reference}: neither pictures nor statistics in common for {', '.join(args.metrics)}; give pictures")
    for metric in [k for k, v in result.items() if v is None]:
        print(f"{metric}: left out, one side is statistics alone; give its pictures")
    first = next(iter(sides))
    recipe = dict(samples=describe(args.samples, sides[first].pictures or sides[first].count),
                  reference=describe(args.reference, references[first].count or references[first].pictures),
                  metrics=args.metrics, precision="fp32, moments fp64", crop=args.crop, **{k: v for n in networks.values() for k, v in n.id.items()},
                  is_chunk=IS_CHUNK, neighbour=NEIGHBOUR, reference_pictures=references[first].pictures, torch=torch.__version__, device=device.type)
    return {**result, "rank_deficient": bool(deficient), "recipe": recipe}


if __name__ == "__main__":
    run(main)
