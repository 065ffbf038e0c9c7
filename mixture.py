"""Several caches that train together: which one each sample is of, what each lacks, the classes united."""
import threading

import numpy as np
import torch

from dataset import Cache, masks, said_of, schema
from distributed import check
from modalities import MODALITIES

BLOCK = 1024  # samples whose caches are drawn together


class Mixture:
    """Several Caches of one autoencoder and size as one: whose a sample is, is drawn by their weights from
    (seed, sample); each walks its own permutations. A row is (cache, row of its arrays).

    weights: default the numbers of rows. Raises InputError where the caches do not go together.
    """

    def __init__(self, caches, weights=None):
        self.caches, self.folder = caches, " ".join(str(cache.folder) for cache in caches)
        check(weights is None or len(weights) == len(caches), f"--weights: {len(weights or ())} of them, "
              f"--data has {len(caches)} caches")
        weights = np.array([len(cache.rows) for cache in caches] if weights is None else weights, float)
        check(np.isfinite(weights).all() and (weights > 0).all(), f"--weights {weights.tolist()}: must be "
              "above 0")
        self.weights = weights / weights.sum()
        self.modalities = tuple(m for m in MODALITIES if any(m in cache.modalities for cache in caches))
        self.meta = _united([cache.meta for cache in caches], [str(cache.folder) for cache in caches],
                            self.modalities)
        self.stems = tuple(dict.fromkeys(stem for cache in caches for stem in cache.stems))
        rows = [(row, i) for i, cache in enumerate(caches) for row in cache.rows.tolist()]
        self.rows = np.array(sorted(rows))[:, ::-1]  # in turns
        names = {name: k for k, name in enumerate(self.meta["class_names"])}
        self._classes = [np.array([*(names[name] for name in cache.meta["class_names"]), len(names)])
                         for cache in caches]
        self._before, self._lock = {}, threading.Lock()

    @property
    def labels(self):
        return np.concatenate([table[cache.labels] for table, cache in zip(self._classes, self.caches)])

    def known_of(self, rows, modalities):
        """The shares of known cells of rows (n, 2): (n, M)."""
        out = np.zeros((len(rows), len(modalities)))
        for i, cache in enumerate(self.caches):
            mine = rows[:, 0] == i
            out[mine] = cache.known_of(rows[mine, 1], modalities)
        return out

    def _choices(self, seed, block):
        chosen = np.random.default_rng((seed, block, 1)).choice(len(self.caches), BLOCK, p=self.weights)
        return chosen, np.bincount(chosen, minlength=len(self.caches))

    def _counts(self, seed, block):
        """How many samples before a block are of each cache."""
        with self._lock:
            before = self._before.setdefault(seed, [np.zeros(len(self.caches), np.int64)])
            while len(before) <= block:
                before.append(before[-1] + self._choices(seed, len(before) - 1)[1])
            return before[block]

    def order(self, seed, start, count):
        """Rows of the samples start .. start + count: (count, 2)."""
        first, last = start // BLOCK, (start + count - 1) // BLOCK
        chosen = np.concatenate([self._choices(seed, block)[0] for block in range(first, last + 1)])
        skipped, chosen = np.split(chosen[:start - first * BLOCK + count], [start - first * BLOCK])
        begin = self._counts(seed, first) + np.bincount(skipped, minlength=len(self.caches))
        rows = np.stack([chosen, np.zeros_like(chosen)], 1)
        for i, cache in enumerate(self.caches):
            mine = chosen == i
            rows[mine, 1] = cache.order(seed, begin[i], mine.sum())
        return rows

    def gather(self, rows, stems, pin=False):
        """Rows (n, 2) -> {stem: CPU tensor}; zeros of what a cache has not, all known where it says
        nothing.
        """
        kinds, out = {}, {}
        for cache in self.caches:
            kinds |= schema(cache.meta) | masks(cache.meta)
        for stem in stems:
            dtype, shape = kinds[stem]
            values = np.full((len(rows), *shape), 255 if stem.endswith("_known") else 0, dtype)
            for i, cache in enumerate(self.caches):
                mine = rows[:, 0] == i
                if stem in cache.stems and mine.any():
                    found = cache.array(stem)[rows[mine, 1]]
                    values[mine] = self._classes[i][found] if stem == "labels" else found
            out[stem] = torch.from_numpy(values)
        return {stem: x.pin_memory() for stem, x in out.items()} if pin else out

    def aligned(self, rows):
        """Whether rows (n, 2) have alignment targets."""
        return np.array(["dino" in cache.stems for cache in self.caches])[rows[:, 0]]


def _united(metas, folders, modalities):
    """The meta.json of several caches. Raises InputError for the first key that does not go together."""
    metas = [{"shown": {}, **meta} for meta in metas]  # older ones do not say it
    first, out = metas[0], dict(metas[0])
    for meta, folder in zip(metas, folders):
        for key in ("vae", "vae_sha256", "scale", "latent_channels", "latent_size", "resolution", "feature",
                    "shown"):
            theirs, ours = said_of(key, meta, folder), said_of(key, first, folders[0])
            check(first.get(key) == meta.get(key), f"{folder}/meta.json: {key} is {theirs}, {folders[0]} has "
                  f"{ours}; caches that train together must be alike")
    labelled = [meta for meta in metas if "seg" in meta["modalities"]]
    taught = [meta for meta in metas if meta["teacher"]]
    for key, held in (("teacher", taught), ("palette", labelled), ("seg_mode", labelled)):
        values = [meta[key] for meta in held]
        check(all(value == values[0] for value in values), f"--data {' '.join(folders)}: {key} differs "
              f"({', '.join(str(value)[:40] for value in values)}); caches that train together must agree")
        out[key] = values[0] if values else first[key]
    classes = list(dict.fromkeys(name for meta in metas for name in meta["class_names"]))
    return {**out, "modalities": list(modalities), "class_names": classes, "num_classes": len(classes),
            "count": sum(meta["count"] for meta in metas), "source": "several caches",
            "depth_space": [meta["depth_space"] for meta in metas],
            "names_sha256": [meta["names_sha256"] for meta in metas]}


def open_caches(folders, weights=None):
    """The Cache of a folder, the Mixture of several."""
    check(len(folders) > 1 or not weights, "--weights: of several caches, --data A B")
    caches = [Cache(folder) for folder in folders]
    return caches[0] if len(caches) == 1 else Mixture(caches, weights)
