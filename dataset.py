"""The cache that prep_latents.py writes and train.py reads: a folder of memory-mapped arrays.

    <modality>.npy  float16 (n, 2, C, H, W), mean and log-std of the autoencoder's posterior;
                    without an autoencoder uint8 (n, 3, H, W)
    dino.npy        int8 (n, T, 768), alignment targets for REPA
    feature.npy     float16 (n, F), a vector of each whole image
    labels.npy      int64 (n,), the number of classes for a row of none
    <modality>_known.npy  uint8 (n, ceil(H*W/8)), a bit a latent cell: whether at least half of its pixels
                    are known; only where some cell of the cache is not
    done.npy        uint8 (n,): 0 not encoded yet, 1 done, 2 broken and left out
    names.txt, meta.json
"""
import errno
import io
import json
import os
import pathlib

import numpy as np
import torch

from distributed import InputError, check, prefetch, reading, whole_file
from modalities import shown_of

FORMAT = "mmgen-cache-1"
DEFAULT = pathlib.Path("data/cache")
KEYS = ("modalities", "vae", "vae_sha256", "scale", "latent_channels", "latent_size", "resolution", "count",
        "num_classes", "class_names", "palette", "grid", "teacher", "names_sha256", "seg_mode", "depth_space",
        "batch_size")


def schema(meta):
    """The arrays of a cache: {file stem: (dtype, shape of a row)}."""
    size = tuple(meta["latent_size"])
    stored = (np.float16, (2, meta["latent_channels"], *size))
    if meta["vae"] == "none":
        stored = (np.uint8, (3, *size))
    arrays = {m: stored for m in meta["modalities"]}
    if meta["teacher"]:
        arrays["dino"] = (np.int8, (meta["grid"][0] * meta["grid"][1], 768))
    if meta.get("feature"):
        arrays["feature"] = (np.float16, (meta["feature_size"],))
    return arrays | {"labels": (np.int64, ()), "done": (np.uint8, ())}


def masks(meta):
    """The arrays of known cells that a cache may have, as schema has the others."""
    bits = -(-meta["latent_size"][0] * meta["latent_size"][1] // 8)
    return {f"{m}_known": (np.uint8, (bits,)) for m in meta["modalities"]}


def stems_of(folder, meta):
    """The arrays of a cache: schema's, and of masks those that are there."""
    return *schema(meta), *(stem for stem in masks(meta) if (folder / f"{stem}.npy").is_file())


def known_cells(known, factor):
    """Known pixels bool (n, fH, fW) -> a bit a cell (n, ceil(H*W/8)): where at least half of it is known."""
    n, height, width = known.shape
    blocks = known.reshape(n, height // factor, factor, width // factor, factor)
    return np.packbits((blocks.mean((2, 4)) >= 0.5).reshape(n, -1), axis=1)


def cells_of(bits, size):
    """Bits of known_cells, a tensor (n, B) -> bool (n, H, W)."""
    shifts = torch.arange(7, -1, -1, device=bits.device)
    flags = (bits[:, :, None] >> shifts & 1).flatten(1)            # (n, 8B)
    return flags[:, :size[0] * size[1]].unflatten(1, tuple(size)) > 0


def cells_in(batch, modalities, meta):
    """Of a batch {stem: tensor}: which cells are known (n, M, H, W) bool, None where it does not say."""
    found = {m: cells_of(batch[f"{m}_known"], meta["latent_size"])
             for m in modalities if f"{m}_known" in batch}
    if not found:
        return None
    everywhere = torch.ones_like(next(iter(found.values())))
    return torch.stack([found.get(m, everywhere) for m in modalities], 1)


def to_unit(vectors):
    """Vectors (n, F) as feature.npy holds them: float16 of mean square 1."""
    size = np.sqrt((vectors ** 2).mean(-1, keepdims=True))
    return (vectors / np.maximum(size, 1e-8)).astype(np.float16)


# ------------------------------------------------------------------------------------------------
# Writing.

def create(folder, meta, names, labels=None):
    """Create the files of a cache, all their space at once, or check that the folder's are of this cache.

    labels (n,) where they are known beforehand. Raises InputError where the folder holds another cache.
    """
    path = folder / "meta.json"
    if path.exists():
        return check_same(folder, meta, labels)
    listed, there = os.fsencode("\n".join(names)) + b"\n", folder / "names.txt"
    if not there.is_file() or there.read_bytes() != listed:  # else a killed process began here
        for name in ("names.txt", "skipped.txt", *(f"{stem}.npy" for stem in schema(meta))):
            check(not (folder / name).exists(), f"{folder / name}: is there, and of no cache of these "
                  "samples; use another --out")
        with whole_file(there) as file:
            file.write(listed)
    for stem, (dtype, shape) in schema(meta).items():
        with whole_file(folder / f"{stem}.npy") as file:
            if stem == "labels" and labels is not None:
                np.save(file, labels)
            else:
                _reserve(file, np.dtype(dtype), (len(names), *shape))
    with whole_file(path) as file:  # last: its presence says that all files are there
        file.write(json.dumps(meta, indent=1).encode())


def begin_masks(folder, meta):
    """Before rows are written: the arrays of known cells that are not there, all known."""
    if (open_array(folder, "done", meta) == 1).all():
        return
    for stem, (dtype, shape) in masks(meta).items():
        if not (folder / f"{stem}.npy").exists():
            with whole_file(folder / f"{stem}.npy") as file:
                np.save(file, np.full((meta["count"], *shape), 255, dtype))


def finish_masks(folder, meta):
    """Take the arrays of known cells away where nothing is unknown -> {modality: share of known cells (n,)}
    of the others.
    """
    found, done = {}, open_array(folder, "done", meta) == 1
    for m in meta["modalities"]:
        path = folder / f"{m}_known.npy"
        if not path.is_file():
            continue
        share = shares(open_array(folder, path.stem, meta), meta)
        if (share[done] == 1).all():
            path.unlink()
        else:
            found[m] = share[done]
    return found


def shares(bits, meta):
    """Bits of known_cells (n, B) -> the share of known cells (n,)."""
    count = meta["latent_size"][0] * meta["latent_size"][1]
    flags = np.packbits(np.arange(8 * bits.shape[1]) < count)
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)
    return ones[bits & flags].sum(1, dtype=np.int64) / count


def _reserve(file, dtype, shape):
    """Write an .npy header and take all the space behind it: a full disk shows now."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr=dtype.str, fortran_order=False, shape=shape))
    file.write(header.getvalue())
    length = file.tell() + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    file.truncate(length)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # network drives cannot reserve
                raise


def said_of(key, meta, folder):
    """A value of the folder's meta.json for a line, "shown" as the flags that say so."""
    return shown_of(meta, f"{folder}/meta.json").flags() if key == "shown" else str(meta.get(key))[:80]


def check_same(folder, meta, labels=None):
    """Raise InputError unless the folder's cache has this meta.json, naming the first key that differs, and
    these labels (n,), where they are known beforehand.
    """
    old = {"shown": {}, "space": meta.get("space"), **read_meta(folder)}  # older ones do not say them
    for key, value in {"shown": {}, **meta}.items():
        was, now = said_of(key, old, folder), said_of(key, {key: value}, folder)
        check(old.get(key) == value, f"{folder}/meta.json: {key} is {was}, this run has {now}; use another "
              "--out")
    if labels is not None:
        held = open_array(folder, "labels", meta)
        for row in np.flatnonzero(held != labels)[:1]:
            raise InputError(f"{folder}/labels.npy: row {row} is of class {held[row]}, in this run of "
                             f"{labels[row]}; use another --out")


# ------------------------------------------------------------------------------------------------
# Reading.

def read_meta(folder):
    """meta.json of a cache. Raises InputError where there is none or it is of another format."""
    path = pathlib.Path(folder) / "meta.json"
    check(path.is_file(), f"{folder}: no cache there; make one with `python prep_latents.py --toy 20000 "
          f"--out {folder}` (toy world) or `--data DIR` (your pictures)")
    again = f"delete {folder} and run prep_latents.py again"
    with reading(path, again):
        meta = json.loads(path.read_text())
    found = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
    check(found == FORMAT, f"{path}: format is {found!r}, expected {FORMAT!r}; {again}")
    for key in KEYS:
        check(key in meta, f"{path}: has no {key}; {again}")
    for key in ("count", "scale", "resolution", "latent_channels", "num_classes"):
        check(isinstance(meta[key], (int, float)) and 0 <= meta[key] < 1e12,
              f"{path}: {key} is {str(meta[key])[:40]}, expected a number; {again}")
    with reading(path, again):
        schema(meta)
    return meta


def open_array(folder, stem, meta, mode="r"):
    """One array of a cache as memory map. Raises InputError when it is missing, short or of another shape."""
    path = pathlib.Path(folder) / f"{stem}.npy"
    dtype, row = (schema(meta) | masks(meta))[stem]
    again = f"delete {folder} and run prep_latents.py again"
    with reading(path, again):
        array = np.load(path, mmap_mode="r")  # at first: a short file mapped for writing is filled with zeros
    wanted = (meta["count"], *row)
    check(array.dtype == dtype and array.shape == wanted,
          f"{path}: {array.dtype} {array.shape}, meta.json asks for {np.dtype(dtype)} {wanted}; {again}")
    return array if mode == "r" else np.load(path, mmap_mode=mode)


class Cache:
    """A finished cache: meta, modalities, stems of its arrays, rows (indices of what could be encoded).

    Raises InputError when it is missing, unfinished or damaged.
    """

    def __init__(self, folder):
        self.folder, self.meta = folder, read_meta(folder)
        self.modalities = tuple(self.meta["modalities"])
        self.stems = stems_of(pathlib.Path(folder), self.meta)
        self._arrays, self._known, self._shuffled = {}, {}, (None, None)
        done, count, classes = self.array("done"), self.meta["count"], self.meta["num_classes"]
        left = int((done == 0).sum())
        check(not left, f"{folder}: {left} of {count} rows are not encoded yet; "
              "run the same prep_latents.py command again")
        self.rows = np.flatnonzero(done == 1)
        check(len(self.rows), f"{folder}: none of its {count} rows could be encoded, see skipped.txt")
        low, high = self.labels.min(), self.labels.max()
        check(0 <= low and high <= classes,
              f"{folder}/labels.npy: classes {low} to {high}, meta.json has {classes} ({classes}: none)")

    @property
    def labels(self):
        """Of all rows that could be encoded, (n,)."""
        return self.array("labels")[self.rows]

    def known(self, modality):
        """The share of known cells of a modality in every row of the arrays; 0 where it is not there."""
        if modality not in self._known:
            stem, count = f"{modality}_known", self.meta["count"]
            share = np.full(count, float(modality in self.modalities))
            if stem in self.stems:
                share = shares(self.array(stem), self.meta)
            self._known[modality] = share
        return self._known[modality]

    def known_of(self, rows, modalities):
        """The shares of known cells of rows (n,): (n, M)."""
        return np.stack([self.known(m)[rows] for m in modalities], 1)

    def array(self, stem):
        """The memory map of one of the stems, opened when it is first asked for."""
        if stem not in self._arrays:
            self._arrays[stem] = open_array(self.folder, stem, self.meta)
        return self._arrays[stem]

    def _permutation(self, seed, epoch):
        key, order = self._shuffled
        if key != (seed, epoch):
            order = np.random.default_rng((seed, epoch)).permutation(self.rows)
            self._shuffled = (seed, epoch), order
        return order

    def order(self, seed, start, count):
        """Rows of the samples start .. start + count: a permutation an epoch, seeded by (seed, epoch)."""
        places = (divmod(k, len(self.rows)) for k in range(start, start + count))
        return np.array([self._permutation(seed, epoch)[at] for epoch, at in places])

    def aligned(self, rows):
        """Whether rows (n,) have alignment targets."""
        return np.full(len(rows), "dino" in self.stems)

    def gather(self, rows, stems, pin=False):
        """Rows -> {stem: CPU tensor}."""
        batch = {stem: torch.from_numpy(self.array(stem)[rows]) for stem in stems}
        return {stem: x.pin_memory() for stem, x in batch.items()} if pin else batch


def part_of(batch_size, micro_batch, rank, world, group):
    """This process's rows of the global batch, a slice of whole groups of rows.

    Raises InputError where the batch has fewer groups than processes, or where batch_size or micro_batch is
    no multiple of the group.
    """
    check(micro_batch >= group and micro_batch % group == 0, f"--micro-batch {micro_batch}: must be a "
          f"multiple of {group}")
    most = 2 ** 16  # every process draws the noise of the whole batch
    groups = batch_size // group
    check(batch_size % group == 0 and world <= groups and batch_size <= most,
          f"--batch-size {batch_size} on {world} processes: must be a multiple of {group}, "
          f"with at least {group} rows for each process, at most {most}")
    return slice(groups * rank // world * group, groups * (rank + 1) // world * group)


def batches(cache, stems, modalities, seed, steps, batch_size, part, device):
    """Yield {stem: tensor on the device} of each step: this process's part (a slice) of the global batch.

    Of the whole batch (N rows) also "known", the shares of known cells of the modalities (N, M), and
    "aligned" (N,), whether alignment targets of a row are read. The next steps' rows are gathered in threads
    while the device works: pages may be cold.
    """
    def read(step):
        rows = cache.order(seed, step * batch_size, batch_size)
        batch = cache.gather(rows[part], stems, pin=device.type == "cuda")
        batch["known"] = torch.from_numpy(cache.known_of(rows, modalities)).float()
        batch["aligned"] = torch.from_numpy(cache.aligned(rows) & ("dino" in stems))
        return batch

    for batch in prefetch(read, steps, threads=4, ahead=4):
        yield {stem: x.to(device, non_blocking=True) for stem, x in batch.items()}
