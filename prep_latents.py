"""Stage 2: encode every modality once into a memory-mapped cache that train.py reads (MMGen, Sec. 4.1).

    python prep_latents.py --toy 20000                                    # the toy world -> data/cache
    torchrun --nproc_per_node=8 -- prep_latents.py --data imagenet_mm     # a folder of pictures
    python prep_latents.py --data hypersim.jsonl --no-class               # an index of pictures, no classes

The pictures are ROOT/{rgb,depth,normal,seg}/<class>/<name>.png, with equal names below each modality, or
those that an index names (listing.py). The cache's files are described in dataset.py. An interrupted run
continues with the same command. Blocks of --batch-size consecutive rows are encoded together whatever the
number of processes, so that the cache depends on neither it nor on interruptions.
"""
import functools
import hashlib
import os
import pathlib
import time
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import dataset
import toy_scenes
from distributed import (InputError, barrier, check, check_apart, check_folder, check_ranges, command_parser,
                         prefetch, run, say, setup, share)
from images import centre_crop, label_colour
from listing import list_samples, place_of_facts
from locks import only_writer
from mix import LEAST_GIVEN
from modalities import (MODALITIES, PLAIN_FACTS, PLAIN_SHOWN, VOID, WAYS, Shown, check_target, check_turned,
                        is_array, read_picture, spoken)
from trees import facts_of, read_palette
from vae import load_encoder, timm_model


# ------------------------------------------------------------------------------------------------
# Sources. A source has modalities, size, names and labels of its rows (None: known once rendered), facts
# for meta.json, and load(i) -> {modality: pixels (3, size, size)}, {modality: where they are known, bool
# (size, size)} of what is not known everywhere, the row's Scene or None.

class ToySource:
    """`count` scenes of the toy world, of the seeds from `start` on; shown: how depth is shown."""

    def __init__(self, start, count, size, modalities=(), shown=PLAIN_SHOWN):
        check(start >= 0, f"--toy-start {start}: seeds start at 0")
        check(not start < toy_scenes.HELD_OUT < start + count, f"--toy-start {start} --toy {count}: runs "
              f"into the held-out seeds from {toy_scenes.HELD_OUT} on")
        self.start, self.size, self.shown = start, size, shown
        self.modalities = modalities or tuple(toy_scenes.MAPS)
        for m in self.modalities:
            check(m in toy_scenes.MAPS or MODALITIES[m].derive, f"--toy with --modalities {m}: the toy world "
                  f"has {', '.join(toy_scenes.MAPS)}, and what a row of MODALITIES derives from the RGB; "
                  "give files with --data")
        self.names = [str(seed) for seed in range(start, start + count)]
        self.labels = None
        self.told = dict(source="toy", seg_mode="semantic", depth_space="disparity",
                         palette=toy_scenes.PALETTE.tolist(), class_names=list(toy_scenes.CLASSES))
        if shown != PLAIN_SHOWN:
            self.told["shown"] = shown.told()

    def load(self, i):
        scene = toy_scenes.render(self.start + i, self.size)
        arrays, pixels = toy_scenes.maps(scene), {}
        arrays["depth"] = spoken(scene.depth, self.shown.depth_target)
        for m in self.modalities:
            row = MODALITIES[m]
            array = arrays[m] if m in arrays else row.derive(arrays["rgb"])
            pixels[m] = row.checked(row.to_pixels(array, shown=self.shown), f"{m} of scene {self.names[i]}")
        return pixels, {}, scene


def hold_labels(files, facts):
    """Whether segmentation files hold labels, by the first one that can be read."""
    for path in files:
        try:
            return MODALITIES["seg"].open(path, facts).labels is not None
        except InputError:  # said when its row is made
            pass
    return False


def palette_of(files, facts):
    """The colours of the labels that occur in files, where nobody tells them: the files' own palette if they
    all have the same, else label_colour's.
    """
    def look(path):
        try:
            raster = MODALITIES["seg"].open(path, facts)
            own = None if is_array(path) else read_picture(path).palette
        except InputError:  # said when its row is made
            return -1, None
        if raster.labels is None:
            return -1, None
        highest = raster.labels[raster.where_known].max(initial=-1)
        return highest, None if own is None else own.tobytes()

    highest, own = zip(*prefetch(look, files, threads=8, ahead=64))
    count = int(max(highest)) + 1
    check(count <= VOID, f"labels up to {count - 1}: a semantic segmentation has up to {VOID} classes; is it "
          "--seg-mode instance?")
    if None not in own and len(set(own)) == 1:
        return np.frombuffer(own[0], np.uint8).reshape(-1, 3)[:count]
    return label_colour(np.arange(count))


class View(NamedTuple):
    """A square of a picture of any size, perhaps mirrored."""
    side: float = 1.0    # of the picture's shorter one
    across: float = 0.5  # where it lies, 0 at the left, 1 at the right
    down: float = 0.5
    mirrored: bool = False

    @classmethod
    def of(cls, name, number):
        """A random one, the same for a name and number at any time."""
        draw = np.random.default_rng([number, zlib.crc32(os.fsencode(name))]).random(4)
        return cls(0.7 + 0.3 * draw[0], draw[1], draw[2], draw[3] < 0.5)

    def part(self, image):
        """A PIL image -> the square of it, not mirrored."""
        side = round(self.side * min(image.size))
        left, top = round(self.across * (image.width - side)), round(self.down * (image.height - side))
        return image.crop((left, top, left + side, top + side))


class PictureSource:
    """The files of a Listing; facts: what they hold; shown: how the network is shown them."""

    def __init__(self, listing, size, facts=PLAIN_FACTS, shown=PLAIN_SHOWN):
        self.listing, self.size, self.facts, self.shown = listing, size, facts, shown
        self.modalities, self.files, self.names = listing.modalities, listing.files, listing.names
        number = {name: i for i, name in enumerate(listing.classes)}
        self.labels = np.array([number.get(label, len(number)) for label in listing.labels])
        self.labelled = "seg" in self.files and hold_labels(self.files["seg"].values(), facts)
        semantic = facts.seg_mode == "semantic"
        if semantic and self.labelled and facts.palette is None:
            self.facts = facts._replace(palette=palette_of(self.files["seg"].values(), facts))
        told = semantic and self.facts.palette is not None
        self.told = dict(source="index" if listing.lines else "folder",
                         seg_mode=facts.seg_mode or "instance", depth_space=facts.depth_space,
                         class_names=listing.classes, shown=shown.told(),
                         palette=self.facts.palette.tolist() if told else None)

    def load(self, i):
        """Raises InputError for a broken file, and for maps of another aspect than their RGB's."""
        number, sample = divmod(i, len(self.listing.names))
        name = self.listing.names[sample]
        view = View.of(name, number) if number else None
        try:
            pixels, known = self._load(name, view)
        except InputError as error:
            said = f"view {number} of " if number else ""
            raise InputError(f"{self.listing.where(sample)}{said}{error}") from error
        if view and view.mirrored:
            pixels = {m: MODALITIES[m].mirrored(x) for m, x in pixels.items()}
            known = {m: there[:, ::-1] for m, there in known.items()}
        return pixels, known, None

    def _load(self, name, view):
        def fit(image, nearest):
            return centre_crop(view.part(image) if view else image, self.size, nearest)

        rasters = {m: MODALITIES[m].open(files[name], self.facts) for m, files in self.files.items()}
        if "seg" in rasters:
            rasters["seg"] = MODALITIES["seg"].of_classes(rasters["seg"])
        aspects = {m: raster.size[0] / raster.size[1] for m, raster in rasters.items()}
        for m, raster in rasters.items():
            check(abs(aspects[m] / aspects["rgb"] - 1) <= 0.02, f"{raster.path}: aspect {aspects[m]:.3f}, "
                  f"its RGB has {aspects['rgb']:.3f}; the maps would not align")
        check_turned(list(rasters.values()))
        pixels, known = {}, {}
        for m in self.modalities:
            row = MODALITIES[m]
            if m in rasters:
                there = rasters[m].known_at(fit)
                known |= {} if there is None else {m: there}
                if view and there is not None and not there.any():  # known elsewhere in the picture
                    pixels[m] = np.zeros((3, self.size, self.size), np.float32)
                else:
                    pixels[m] = row.pixels(rasters[m], fit, self.shown)
            else:
                rgb = MODALITIES["rgb"].array(rasters["rgb"], fit)
                pixels[m] = row.to_pixels(row.derive(rgb))
        return pixels, known


def add_views(source, views):
    """--views: after all rows of a PictureSource, a View of each, then the next of each."""
    more = [f"{name} (view {number})" for number in range(1, views) for name in source.names]
    source.names = [*source.names, *more]
    source.labels = np.tile(source.labels, views)


def drop_classes(source):
    """--no-class: the label of every row is the number of classes, 0."""
    source.labels = np.zeros(len(source.names), np.int64)
    source.told["class_names"] = []


# ------------------------------------------------------------------------------------------------
# Teachers. Called with rgb (B, 3, S, S) in [-1, 1] and the rows' scenes; id names them in meta.json.

def _standardised(model, rgb):
    """Pixels in [-1, 1] -> with the mean and deviation of the model's training, on its device."""
    device = next(model.parameters()).device
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    return ((rgb.to(device) + 1) / 2 - mean) / std


class Dino:
    """DINOv2-B/14 patch tokens after the final norm, 14 px per token (224 px for a 16x16 grid): REPA's."""

    id = "dinov2-vitb14"

    def __init__(self, grid, file, device):
        self.size = 14 * grid
        remedy = "pass DINOv2-B/14 weights with --dino FILE, or --no-dino to train without REPA"
        model = timm_model("vit_base_patch14_dinov2.lvd142m", file, remedy, img_size=self.size)
        self.model = model.to(device)

    def __call__(self, rgb, scenes):
        """-> (B, T, 768), without the class token."""
        x = F.interpolate(_standardised(self.model, rgb), self.size, mode="bicubic")
        return self.model.forward_features(x)[:, 1:].float().cpu().numpy()


class ToyTeacher:
    """The toy world's tokens, computed from the scene itself."""

    id = "toy-teacher"

    def __init__(self, grid):
        self.grid = grid

    def __call__(self, rgb, scenes):
        """-> (B, T, 768)"""
        return np.stack([toy_scenes.teacher(scene, self.grid) for scene in scenes])


class Feature:
    """A vector of each whole image: what a timm model pools (of DINOv2 the class token; of CLIP the pooled
    token before its projection).
    """

    def __init__(self, name, file, device):
        remedy = f"--feature {name}: check the timm name, or pass its weights with --feature-file FILE"
        self.model = timm_model(name, file, remedy).to(device)
        self.id, self.size = name, self.model.num_features

    def __call__(self, rgb, scenes):
        """-> (B, F)"""
        shape = self.model.pretrained_cfg["input_size"][1:]
        x = F.interpolate(_standardised(self.model, rgb), shape, mode="bicubic", antialias=True)
        return self.model(x).float().cpu().numpy()


class ToyFeature:
    """The mean of the toy world's tokens over the picture."""

    id, size = ToyTeacher.id, 768

    def __call__(self, rgb, scenes):
        """-> (B, 768)"""
        return np.stack([toy_scenes.teacher(scene, 1)[0] for scene in scenes])


def to_int8(tokens):
    """Each token scaled so that its largest entry is 127: a cosine needs no scale."""
    largest = np.abs(tokens).max(-1, keepdims=True)
    return (tokens / np.maximum(largest, 1e-8) * 127).round().astype(np.int8)


# ------------------------------------------------------------------------------------------------
# Rows.

class Block(NamedTuple):
    """Consecutive rows, read and not yet encoded."""
    rows: range
    pixels: dict   # {modality: (B, 3, S, S)}
    known: dict    # {modality: bool (B, S, S)}
    scenes: list   # of the toy world, else of None
    broken: dict   # {row: why}; such a row keeps its place, so that the others are encoded as ever

    @property
    def part(self):
        return slice(self.rows.start, self.rows.stop)


class Pipeline(NamedTuple):
    """What makes the rows of a cache; teacher and feature are None where they are not wanted."""
    source: object
    encoder: object
    teacher: object
    feature: object

    def meta(self, batch_size):
        """meta.json of the cache."""
        source, encoder = self.source, self.encoder
        side = source.size // encoder.factor
        names = hashlib.sha256(os.fsencode("\n".join(source.names))).hexdigest()
        return dict(format=dataset.FORMAT, modalities=list(source.modalities), vae=encoder.name,
                    vae_sha256=encoder.sha256, scale=encoder.scale, space=encoder.space,
                    latent_channels=encoder.channels, latent_size=[side, side], resolution=source.size,
                    count=len(source.names), num_classes=len(source.told["class_names"]),
                    batch_size=batch_size,
                    grid=[side // 2, side // 2], teacher=self.teacher and self.teacher.id,
                    feature=self.feature and self.feature.id,
                    feature_size=self.feature and self.feature.size, names_sha256=names, **source.told)

    def load(self, rows, skip_broken):
        """The rows (a range) -> Block. Raises InputError for a broken file unless skip_broken."""
        pixels = {m: np.zeros((len(rows), 3, self.source.size, self.source.size), np.float32)
                  for m in self.source.modalities}
        known = {m: np.ones((len(rows), *x.shape[2:]), bool) for m, x in pixels.items()}
        scenes, broken = [None] * len(rows), {}
        for place, i in enumerate(rows):
            try:
                loaded, there, scenes[place] = self.source.load(i)
            except InputError as error:
                check(skip_broken, f"{error}; --skip-broken leaves such files out")
                broken[i] = str(error)
                continue
            for m, values in loaded.items():
                pixels[m][place] = values
            for m, flags in there.items():
                known[m][place] = flags
        return Block(rows, {m: torch.from_numpy(x) for m, x in pixels.items()}, known, scenes, broken)

    @torch.inference_mode()
    def encode(self, block):
        """A Block -> {file stem: its part of the array}."""
        out = {m: self.encoder.store(x) for m, x in block.pixels.items()}
        for m, known in block.known.items():
            out[f"{m}_known"] = dataset.known_cells(known, self.encoder.factor)
        if self.teacher is not None:
            out["dino"] = to_int8(self.teacher(block.pixels["rgb"], block.scenes))
        if self.feature is not None:
            out["feature"] = dataset.to_unit(self.feature(block.pixels["rgb"], block.scenes))
        if self.source.labels is None:
            out["labels"] = np.array([scene.label for scene in block.scenes], np.int64)
        return out


# ------------------------------------------------------------------------------------------------
# The cache.

class Writer:
    """Writes blocks into a cache's arrays; marks them done when their data is on the disk."""

    def __init__(self, out, meta):
        self.arrays = {stem: dataset.open_array(out, stem, meta, "r+")
                       for stem in dataset.stems_of(out, meta)}
        self.done = self.arrays.pop("done")
        self.pending, self.flushed = [], time.monotonic()

    def write(self, block, values):
        """values: {file stem: the block's part of the array}."""
        for stem in self.arrays.keys() & values.keys():
            self.arrays[stem][block.part] = values[stem]
        self.pending.append(block)
        if time.monotonic() - self.flushed > 5:
            self.flush()

    def flush(self):
        for array in self.arrays.values():
            array.flush()  # the data first, then the mark
        for block in self.pending:
            self.done[block.part] = [2 if i in block.broken else 1 for i in block.rows]
        self.done.flush()
        self.pending, self.flushed = [], time.monotonic()


def fill(out, meta, pipeline, skip_broken, rank, world):
    """Encode the blocks that are not done yet, shared out over the processes -> number of rows left out."""
    writer, names = Writer(out, meta), pipeline.source.names
    finished = [1, 2] if skip_broken else [1]  # else what was left out is tried again: it may be mended
    todo = [rows for rows in share(range(len(names)), rank, world, meta["batch_size"])
            if not np.isin(writer.done[rows.start:rows.stop], finished).all()]
    blocks = prefetch(functools.partial(pipeline.load, skip_broken=skip_broken), todo)
    for block in tqdm(blocks, "encode", len(todo), unit="row", unit_scale=world * meta["batch_size"],
                      disable=rank > 0):
        writer.write(block, pipeline.encode(block))
        for i, message in block.broken.items():
            with open(out / "skipped.txt", "a", errors="backslashreplace") as file:
                file.write(f"{names[i]}\t{message}\n")
    writer.flush()
    barrier()
    return int((dataset.open_array(out, "done", meta) == 2).sum())


def verify(out, meta, pipeline):
    """Encode up to 8 whole blocks again and compare -> number of rows, largest difference.

    Raises InputError at more than one fp16 ulp, of dino more than two int8 levels.
    """
    dataset.check_same(out, meta, pipeline.source.labels)
    cache = dataset.Cache(out)
    count, size = meta["count"], meta["batch_size"]
    compared, worst, side = 0, 0.0, pipeline.source.size
    everywhere = dataset.known_cells(np.ones((1, side, side), bool), pipeline.encoder.factor)
    for start in np.unique(np.linspace(0, (count - 1) // size, 8).astype(int)) * size:
        block = pipeline.load(range(start, min(start + size, count)), skip_broken=True)
        rows = np.intersect1d(cache.rows, block.rows)
        for stem, fresh in pipeline.encode(block).items():
            fresh = fresh[rows - start]
            stored = cache.array(stem)[rows] if stem in cache.stems else everywhere
            tolerance = 2 if stem == "dino" else 0
            if stored.dtype == np.float16:
                tolerance = np.spacing(np.maximum(np.abs(stored), np.abs(fresh)))
            gap = np.abs(fresh.astype(np.float32) - stored.astype(np.float32))
            worst = max(worst, float(gap.max(initial=0)))
            odd = rows[np.argwhere(~(gap <= tolerance))[:, 0]]  # NaN counts as different
            if len(odd):
                name = pipeline.source.names[odd[0]]
                raise InputError(f"{out / stem}.npy: row {odd[0]} ({name}) differs by "
                                 f"{gap.max():.4g} from a fresh encoding; the cache is damaged or of other "
                                 "pictures, make it again")
        compared += len(rows)
    return compared, worst


# ------------------------------------------------------------------------------------------------

def describe(source):
    """What the files of a PictureSource are taken to hold."""
    classes = len(source.told["class_names"])
    without = int((source.labels == classes).sum())
    lines = [f"{len(source.names)} samples in {classes} classes"]
    if without:
        lines = [f"{len(source.names)} samples, {without} of no class, {classes} classes"]
    if "depth" in source.files:
        lines.append(f"depth files hold {source.facts.depth_space} ({source.facts.said})")
    if "seg" in source.files:
        held = "colours"
        if source.labelled:
            told = source.facts.palette is not None
            held = f"labels in {'the palette' if told else 'their own, else Pascal VOC'}'s colours"
        lines.append(f"segmentation is {source.told['seg_mode']}, files hold {held}")
    return "; ".join(lines)


def arguments():
    """The command's flags."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--toy", type=int, metavar="N", help="N toy scenes")
    what.add_argument("--data", type=pathlib.Path, help="folder tree <root>/<modality>/<class>/<name>.png, "
                      "or an index: a JSON object a line, with a path for each modality")
    add("--toy-start", type=int, default=0, metavar="SEED",
        help="first seed (0); held-out scenes start at 2147483648")
    add("--out", type=pathlib.Path, default=dataset.DEFAULT)
    add("--modalities", nargs="+", choices=list(MODALITIES), default=(),
        help="default: all that are there")
    add("--no-class", action="store_true", help="no classes, whatever the folders: all is of the null "
        "class; the default where DATA/tree.json says so")
    add("--views", type=int, default=1, metavar="K", help="each picture K times, from the second on a "
        "random part of it (a square of 0.7 to 1 of its shorter side), half of them mirrored: for small sets")
    add("--size", type=int, help="pixels, square; 256, toy 64")
    add("--vae", help="sd-mse (default for --data), sd-ema, taesd, toy (default for --toy), a file, "
        "TAESD's folder, or none for pixels")
    add("--dino", type=pathlib.Path, metavar="FILE", help="local DINOv2-B/14 weights instead of the hub's")
    add("--no-dino", action="store_true", help="no alignment targets: training runs without REPA")
    add("--feature", metavar="NAME", help="also a vector of each image, of a timm model such as "
        "vit_large_patch14_clip_224.openai; with --toy: toy-teacher")
    add("--feature-file", type=pathlib.Path, metavar="FILE", help="local weights of --feature")
    add("--depth-space", choices=("disparity", "depth"),
        help="what the depth files hold; default: what DATA/tree.json says, else disparity")
    add("--depth-over", choices=WAYS["depth_over"], help="what depth is stretched to the range of: the "
        "whole picture, as released (the default), or its crop")
    add("--depth-norm", choices=WAYS["depth_norm"], help="that range is from the least to the largest (the "
        "default), or from the 2nd to the 98th percentile of the known pixels, clipped")
    add("--depth-target", choices=WAYS["depth_target"], help="depth is learned as disparity (the default) or "
        "as minus its logarithm, of files that hold depth")
    add("--uncovered", choices=WAYS["uncovered"], help="black pixels of instance segments take a random "
        "colour, as released (the default), or stay black")
    add("--seg-mode", choices=("semantic", "instance"),
        help="what the segmentation colours mean; default: what DATA/tree.json says, else instance")
    add("--palette", type=pathlib.Path, metavar="FILE",
        help="colours of labels, a JSON list; default: tree.json's, the file's own, Pascal VOC's")
    add("--batch-size", type=int, default=32, help="rows encoded together; part of the cache's identity")
    add("--skip-broken", action="store_true", help="leave broken files out and list them in skipped.txt")
    add("--verify", action="store_true", help="re-encode a sample of a finished cache and compare")
    return parser.parse_args()


def main():
    """Encode what is missing of the cache, or --verify. A killed run continues."""
    args = arguments()
    toy = args.toy is not None
    size = args.size or (64 if toy else 256)
    check_ranges(args, toy=(1, 10 ** 7), batch_size=(1, None), size=(1, None), views=(1, 1000))
    modalities = tuple(m for m in MODALITIES if m in args.modalities)  # the registry's order
    check(not modalities or "rgb" in modalities,
          f"--modalities {' '.join(modalities)}: rgb must be among them")
    check(not args.dino or not (toy or args.no_dino), f"--dino {args.dino}: not with --no-dino, nor with "
          "--toy, which brings its own alignment targets")
    check(not args.feature or toy == (args.feature == ToyFeature.id), f"--feature {args.feature}: the toy "
          "world brings toy-teacher, and it alone; pictures need the name of a timm model")
    of_files = args.depth_over, args.uncovered, args.views > 1, args.depth_space, args.seg_mode, args.palette
    check(not toy or not any(of_files), "--depth-over, --uncovered, --views, --depth-space, --seg-mode and "
          "--palette belong to --data")
    check(args.feature or not args.feature_file, "--feature-file belongs to --feature")
    given = {name: getattr(args, name) for name in WAYS}
    ways = {name: way for name, way in given.items() if way}
    rank, world, device = setup()
    if toy:
        source = ToySource(args.toy_start, args.toy, size, modalities, Shown(**ways))
    else:
        listing, palette = list_samples(args.data, modalities), args.palette and read_palette(args.palette)
        facts = facts_of(place_of_facts(listing), args.depth_space, palette)
        facts = facts._replace(seg_mode=args.seg_mode or facts.seg_mode)
        shown = Shown(**{name: known[0] for name, known in WAYS.items()} | ways)
        if "depth" in listing.files:
            check_target(args.data, facts, shown.depth_target)
        source = PictureSource(listing, size, facts, shown)
        check_apart([args.out / "meta.json"], [args.data])
        check_folder(args.out, listing.folders())
        add_views(source, args.views)
    bare = not toy and listing.lines is None and facts.classes == "none"  # an index names its own
    if args.no_class or bare:
        drop_classes(source)
    if bare:
        say(f"{args.data}: its folders are no classes, as its tree.json says")
    if not toy:
        say(f"{args.data}: {describe(source)}")
    encoder = load_encoder(args.vae or ("toy" if toy else "sd-mse"), device)
    check(size % (2 * encoder.factor) == 0, f"--size {size}: must be a multiple of {2 * encoder.factor} "
          f"(VAE factor {encoder.factor}, patches of 2)")
    grid = size // encoder.factor // 2
    teacher = feature = None
    if not args.no_dino:
        teacher = ToyTeacher(grid) if toy else Dino(grid, args.dino, device)
    if args.feature:
        feature = ToyFeature() if toy else Feature(args.feature, args.feature_file, device)
    pipeline = Pipeline(source, encoder, teacher, feature)
    meta = pipeline.meta(args.batch_size)
    if args.verify:
        rows, worst = verify(args.out, meta, pipeline)
        print(f"{args.out}: {rows} of {meta['count']} rows re-encoded, largest difference {worst:.2g}")
        return
    with only_writer(args.out):
        if rank == 0:
            dataset.create(args.out, meta, source.names, source.labels)
            if not toy:
                dataset.begin_masks(args.out, meta)
        barrier()
        skipped = fill(args.out, meta, pipeline, args.skip_broken, rank, world)
        known = dataset.finish_masks(args.out, meta) if rank == 0 else {}
    for m, part in known.items():
        print(f"{m}: {part.mean():.1%} of the cells are known; {(part > 0).sum()} of {len(part)} rows have "
              f"it, {(part >= LEAST_GIVEN).sum()} may be given it")
    if rank == 0:
        broken = f", {skipped} broken left out, see {args.out / 'skipped.txt'}" if skipped else ""
        targets = f"REPA targets {meta['teacher']}" if teacher else "no REPA targets"
        print(f"{args.out}: {meta['count'] - skipped} rows of {', '.join(source.modalities)}{broken}, "
              f"{targets}")


if __name__ == "__main__":
    run(main)
