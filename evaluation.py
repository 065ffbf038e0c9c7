"""How good a model is: where frames and their truth come from, what predicts, both together, and what a run
shows of itself while it trains.

A source gives frames with their truth, a predictor maps for frames, a metric (metrics.py) scores the maps of
one modality; evaluate() brings them together and knows nothing else of them.
"""
import functools
import hashlib
import os
import random
import time
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import samplers
import toy_scenes
from distributed import InputError, barrier, check, gather, place, reading, share, whole_file
from images import draw_grid, nearest_colour
from metrics import Rules, metric_class, metrics_of, results
from modalities import MODALITIES, PLAIN_FACTS, PLAIN_SHOWN, check_turned, is_array, shown_of, turned_of
from trees import (classes_of, facts_of, find_pictures, flat_name, folders_of, pictures_by_stem, sample_meta,
                   stem_of)
from vae import encoder_of, latents


# ------------------------------------------------------------------------------------------------
# Files of truth and predictions.

def stems(base):
    """Files below a folder -> {stem as one name: path}."""
    files, first = {}, {}
    for stem, path in pictures_by_stem(base).items():
        name = flat_name(stem)
        check(name not in files, f"{base}: {first.get(name)} and {stem} have one name with _ for /; "
              "rename one")
        files[name], first[name] = path, stem
    return files


def matched(sides):
    """{what: {stem: path}} -> the stems, sorted, and of each {what: path}. Raises InputError naming the first
    one that not all have.
    """
    first = next(iter(sides.values()))
    for what, files in sides.items():
        odd = sorted(first.keys() ^ files.keys())
        if odd:
            path = (first | files)[odd[0]]
            raise InputError(f"{path}: no file with this stem on the other side ({what}; {len(odd)} such); "
                             "names must match")
    return sorted(first), [{what: files[stem] for what, files in sides.items()} for stem in sorted(first)]


def dense():
    """The modalities that are predicted."""
    return [m for m in MODALITIES if m != "rgb"]


def available(given):
    """Those that are given or can be derived of the RGB."""
    return [m for m in dense() if m in given or MODALITIES[m].derive]


# ------------------------------------------------------------------------------------------------
# Sources.

class Frame(NamedTuple):
    index: int               # in the set
    name: str
    truth: dict              # {modality: (H, W[, 3])}
    rgb: np.ndarray = None   # uint8 (H, W, 3); None in a comparison of folders
    class_id: int = None     # None when unknown


class Source:
    """Frames with truth. It says names, recipe, the folders and files that it reads, the modalities of its
    truth (a caller may narrow them), what its segmentation is, and load(i) -> Frame.
    """

    palette, seg_mode, void, folders, files = None, "semantic", None, (), ()
    axes = "ours"  # of the true normals

    def frame(self, i):
        """Frame i, its normals in our axes."""
        frame = self.load(i)
        if self.axes == "marigold" and "normal" in frame.truth:
            frame.truth["normal"] = frame.truth["normal"] * [-1, 1, 1]
        return frame

    def stem(self, i):
        """The name of frame i's maps."""
        return flat_name(self.names[i])

    def place(self, i):
        """Where frame i lies below a modality's folder of a tree, without the ending."""
        return self.names[i]

    def truth(self, given, rgb):
        """The modalities' maps: given ones, and what is derived of the RGB."""
        return {m: given[m] if m in given else MODALITIES[m].derive(rgb) for m in self.modalities}


class Toy(Source):
    """Toy scenes from a seed on, by default held-out ones."""

    palette = toy_scenes.PALETTE

    def __init__(self, count, first=toy_scenes.HELD_OUT):
        self.seeds = range(first, first + count)
        self.names, self.modalities = list(map(str, self.seeds)), available(toy_scenes.MAPS)
        self.recipe = dict(source="toy, held out", seeds=[self.seeds.start, self.seeds.stop])

    def load(self, i):
        scene = toy_scenes.render(self.seeds[i])
        return Frame(i, self.names[i], self.truth(scene._asdict(), scene.rgb), scene.rgb)


GUESSED = 2000  # scenes of training, whose mean is what guessing scores


def toy_training():
    """Those scenes of training."""
    return Toy(GUESSED, 0)


def square(array):
    """The centre square of (H, W[, 3])."""
    height, width = array.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return array[top:top + side, left:left + side]


class Files(Source):
    """Frames of files: {modality: path} of each; facts: what they hold; classes {name: class}."""

    facts, classes = PLAIN_FACTS, {}

    def told(self):
        """The facts by which files are read."""
        return self.facts._replace(palette=self.palette if self.seg_mode == "semantic" else None)

    def load(self, i):
        """RGB and truth, each at its own size, are cut to the centre square; without RGB nothing is.

        Raises InputError where they differ in shape.
        """
        name, files, facts = self.names[i], self.files[i], self.told()
        read = [m for m in ("rgb", *self.modalities) if m in files]
        rasters = {m: MODALITIES[m].open(files[m], facts) for m in read}
        check_turned(list(rasters.values()))
        truth = {m: metric_class(m, self.seg_mode).read(MODALITIES[m], raster)
                 for m, raster in rasters.items() if m != "rgb"}
        if "rgb" not in files:
            return Frame(i, name, truth)
        rgb = MODALITIES["rgb"].array(rasters["rgb"])
        truth, (high, wide) = self.truth(truth, rgb), rgb.shape[:2]
        for m, array in truth.items():
            height, width = array.shape[:2]
            check(abs(wide * height / (high * width) - 1) <= 0.02, f"{name}: the RGB is {wide}x{high}, its "
                  f"{m} {width}x{height}; they must show the same view")
        truth = {m: square(array) for m, array in truth.items()}
        return Frame(i, name, truth, square(rgb), self.classes.get(name))


class ScanNet(Files):
    """Frames as ScanNet exports them: <scene>/{color,colour}/<k>.jpg and <scene>/depth/<k>.png in
    millimetres.

    listed, a file, names the frames (an RGB and a depth file in each line, Marigold's format); count of them
    are drawn with the seed. list: the frames taken, in the same format.
    """

    seg_mode, facts = "instance", PLAIN_FACTS._replace(depth_space="depth", said="ScanNet's millimetres")

    def __init__(self, root, listed=None, count=None, seed=0):
        self.root, self.modalities, self.folders = root, ["depth"], [root]
        pairs = self._listed(listed) if listed else self._found()
        count = count or (len(pairs) if listed else 5000)
        if count < len(pairs):
            pairs = sorted(random.Random(seed).sample(pairs, count))
        self.names = [rgb for rgb, _ in pairs]
        self.files = [{"rgb": root / rgb, "depth": root / depth} for rgb, depth in pairs]
        self.list = os.fsencode("".join(f"{rgb}\t{depth}\n" for rgb, depth in pairs))
        digest = hashlib.sha256(self.list).hexdigest()
        self.recipe = dict(source="scannet", frames_sha256=digest, list=listed and listed.name)

    def stem(self, i):
        return flat_name(self.place(i))

    def place(self, i):
        return PurePosixPath(self.names[i]).with_suffix("").as_posix()

    def _found(self):
        """All frames below the root: (RGB file, depth file), each relative to it."""
        found = [path.relative_to(self.root) for path in find_pictures(self.root)]
        colours = {(p.parents[1], p.stem): p for p in found if p.match("color/*") or p.match("colour/*")}
        depths = {(p.parents[1], p.stem): p for p in found if p.match("depth/*.[pP][nN][gG]")}
        pairs = [(colours[key].as_posix(), p.as_posix()) for key, p in depths.items() if key in colours]
        check(pairs, f"--scannet {self.root}: no frames; the layout is <scene>/color/<k>.jpg beside "
              "<scene>/depth/<k>.png")
        lost = len(depths) - len(pairs)
        if lost:
            print(f"{self.root}: {lost} of {len(depths)} depth frames have no picture in color/ "
                  "and are not used")
        return pairs

    def _listed(self, listed):
        """The frames of a list. Marigold's write 000300.jpg where ScanNet's exporter writes 300.jpg."""
        def there(file):
            path = plain = PurePosixPath(file)
            if path.stem.isdecimal():
                plain = path.with_name(f"{int(path.stem)}{path.suffix}")
            found = [p for p in (path, plain) if (self.root / p).is_file()]
            check(found, f"--list {listed}: {self.root / file}: no such file; "
                  "export this frame or leave its line out")
            return found[0].as_posix()

        with reading(f"--list {listed}", "give a text file"):
            lines = os.fsdecode(listed.read_bytes()).splitlines()
        lines = [line for line in lines if line.strip()]
        pairs = [line.split("\t" if "\t" in line else None)[:2] for line in lines]
        check(pairs and all(len(pair) == 2 for pair in pairs),
              f"--list {listed}: each line names an RGB file and a depth file below {self.root}")
        return [(there(rgb), there(depth)) for rgb, depth in pairs]


class Tree(Files):
    """A folder tree as prep_latents.py reads it; meta: the checkpoint's; facts: what the files hold."""

    def __init__(self, root, meta, facts=PLAIN_FACTS):
        folders = folders_of(root)
        found = {m: stems(folder) for m, folder in folders.items()}
        check("rgb" in found and len(found) > 1, f"--data {root}: needs rgb/ and one of "
              f"{', '.join(dense())}; found {', '.join(found) or 'none'}")
        self.names, self.files = matched(found)
        self.modalities, self.facts, self.folders = available(found), facts, list(folders.values())
        self.void = facts.void
        if "instance" in (facts.seg_mode, meta["seg_mode"]):  # one of both knows no classes
            self.seg_mode = "instance"
        self.palette = facts.palette
        if self.palette is None and meta["palette"]:
            self.palette = np.array(meta["palette"], np.uint8)
        self.places = {name: stem_of(path, folders["rgb"]) for name, path in found["rgb"].items()}
        within = {name: PurePosixPath(place).parent.as_posix() for name, place in self.places.items()}
        known = classes_of(set(within.values()), meta["class_names"])
        if facts.classes != "none":
            self.classes = {name: known[folder] for name, folder in within.items()}
        self.recipe = dict(source="folder", folder=root.name, depth_space=facts.depth_space)

    def place(self, i):
        return self.places[self.names[i]]


class Pairs(Files):
    """Truth and predictions of a folder each, matched by stem; nothing is cropped or resized."""

    def __init__(self, pred, gt, modalities=None, alignment="disparity", facts=PLAIN_FACTS):
        """facts: what the truth holds."""
        of_pred, of_gt = folders_of(pred), folders_of(gt)
        both = [m for m in dense() if m in of_pred and m in of_gt]
        self.modalities, self.facts, self.alignment = modalities or both, facts, alignment
        self.seg_mode, self.palette, self.void = facts.seg_mode or self.seg_mode, facts.palette, facts.void
        self.of_pred = facts_of(pred)
        alone = len(self.modalities) == 1  # its files may lie in the folders themselves
        check(alone or (both and set(self.modalities) <= set(both)),
              f"--pred {pred} --gt {gt}: no {'/ '.join(dense())}/ folder in both; name one with --modality "
              "when the files lie in the folders themselves")
        truth = {m: stems(of_gt.get(m, gt)) for m in self.modalities}
        predictions = {f"predicted_{m}": stems(of_pred.get(m, pred)) for m in self.modalities}
        self.folders = [folder.get(m, base) for m in self.modalities
                        for folder, base in ((of_gt, gt), (of_pred, pred))]
        self._check_space(pred, self.of_pred, predictions.get("predicted_depth", {}).values())
        self.names, self.files = matched(truth | predictions)
        self.recipe = dict(source="predictions", pred=pred.name, gt=gt.name, depth_space=facts.depth_space)

    def _check_space(self, pred, facts, files):
        """Raise InputError where depth is predicted in another space than the alignment's, or in which one
        nobody says.
        """
        space = None if facts.said == PLAIN_FACTS.said else facts.depth_space
        if space is None and sample_meta(pred):
            space = "disparity"
        check(not files or space in (None, self.alignment), f"--pred {pred}: holds {space} ({facts.said}); "
              f"add --alignment {space}")
        for path in files if space is None else ():
            check(self.alignment != "disparity" or is_array(path), f"{path}: a picture may be in "
                  "millimetres, which is depth; if so, add --alignment depth; of disparity say so in "
                  f"{pred}/tree.json")

    def predict(self, frames):
        """A predictor."""
        return [{m: self._prediction(frame, m) for m in frame.truth} for frame in frames]

    def _prediction(self, frame, modality):
        files = self.files[frame.index]
        path, truth, kind = files[f"predicted_{modality}"], files[modality], MODALITIES[modality]
        depth = self.alignment == "depth" and not is_array(path)  # a zero of an array is a value
        facts = self.of_pred._replace(depth_space="depth" if depth else "disparity", palette=None)
        raster = kind.open(path, facts)
        if raster.labels is not None and self.told().palette is not None:
            raster = self._labelled(path, facts)
        check_turned([raster._replace(path=truth, turned=turned_of(truth)), raster])
        found = metric_class(modality, self.seg_mode).read_prediction(kind, raster)
        size, wanted = found.shape[:2], frame.truth[modality].shape[:2]
        check(size == wanted, f"{path}: size {size}, its truth {files[modality]} has {wanted}; "
              "resize the prediction, never the truth")
        return found

    def _labelled(self, path, facts):
        """A file of labels, by the palette that numbers them: the predictions' own, whose colours are taken
        where the truth has another one, else the truth's -> Raster.
        """
        told, own = self.told(), self.of_pred.palette
        raster = MODALITIES["seg"].open(path, facts._replace(palette=told.palette if own is None else own))
        same = own is None or np.array_equal(own, told.palette)
        return raster._replace(labels=raster.labels if same else None, facts=told)


# ------------------------------------------------------------------------------------------------
# Predictors. A predictor is called with a list of Frames and returns a dict for each: {modality: map}, of
# those of frame.truth that it can predict, (H, W[, 3]) at the truth's size, as the modality's metric takes
# it. There may be a spread_<modality>, (H, W), beside a map: it is saved, not scored.

class ModelPredictor(NamedTuple):
    """A model's maps of RGB: frame i's member k of the ensemble is drawn with the noise of i + k * 2^32.

    A model of another kind overrides latents.
    """
    model: torch.nn.Module
    resolution: int
    encoder: object              # of vae.py
    sampling: samplers.Sampling
    metrics: dict                # as of metrics_of
    seed: int = 0
    ensemble: int = 1

    def latents(self, rgb, y, noise):
        """Latents of the RGB (N, C, H, W) and classes (N,) -> of all modalities (N, M*C, H, W)."""
        return samplers.sample_latents(self.model, y, {"rgb": rgb}, noise, self.sampling)

    def draw(self, frames, modalities, indices):
        """Pixels (N, len(modalities), 3, S, S), with the noise of these indices."""
        kind, null = MODALITIES["rgb"], self.model.num_classes
        device = next(self.model.parameters()).device
        rgb = np.stack([kind.to_pixels(kind.crop(frame.rgb, self.resolution)) for frame in frames])
        y = [null if frame.class_id is None else frame.class_id for frame in frames]
        noise = samplers.Noise(self.seed, indices, device)
        given = self.encoder.encode(torch.from_numpy(rgb).to(device), noise)
        x = self.latents(given, torch.tensor(y, device=device), noise)
        wanted = [self.model.modalities.index(m) for m in modalities]
        return samplers.decode(self.encoder, x, wanted, self.sampling.precision)

    def __call__(self, frames):
        wanted = [m for m in self.model.modalities if m in frames[0].truth]
        members = []
        for k in range(self.ensemble):
            indices = [frame.index + (k << 32) for frame in frames]
            members.append(self.draw(frames, wanted, indices).cpu().numpy())
        members = np.stack(members, 2)  # (N, len(wanted), ensemble, 3, S, S)
        return [self._combined(frame, dict(zip(wanted, pixels))) for frame, pixels in zip(frames, members)]

    def _combined(self, frame, members):
        """{modality: pixels (ensemble, 3, S, S)} of one frame -> its maps and spreads."""
        maps = {}
        for m, pixels in members.items():
            kind, shape = MODALITIES[m], frame.truth[m].shape[:2]
            one, spread = self.metrics[m].combine([kind.from_pixels(x) for x in pixels])
            maps[m] = kind.resize(one, shape)
            if spread is not None:
                maps[f"spread_{m}"] = MODALITIES["depth"].resize(spread, shape)
        return maps


class Ceiling(NamedTuple):
    """The truth encoded and decoded: what a perfect model would score."""
    encoder: object
    resolution: int
    metrics: dict
    shown: object = PLAIN_SHOWN  # the model's Shown

    def pixels(self, modality, truth):
        """Truth -> pixels (3, S, S) as training would have seen it."""
        kind, target = MODALITIES[modality], self.metrics[modality].target(truth, self.shown)
        return kind.to_pixels(kind.crop(target, self.resolution), shown=self.shown)

    def decoded(self, modality, truth):
        kind, pixels = MODALITIES[modality], torch.from_numpy(self.pixels(modality, truth))
        x = self.encoder.round_trip(pixels[None])[0].cpu().numpy()
        return kind.resize(kind.from_pixels(x), truth.shape[:2])

    def __call__(self, frames):
        return [{m: self.decoded(m, truth) for m, truth in frame.truth.items()} for frame in frames]


def mean_of(source, ceiling, palette):
    """What guessing scores: the mean of all frames of a Source, as the Ceiling shows them to its model; of
    segments the most frequent colour of the palette uint8 (K, 3), without one none.
    """
    sums, count = {}, len(source.names)
    for i in range(count):
        for m, truth in source.frame(i).truth.items():
            kind = MODALITIES[m]
            part = kind.part(kind.from_pixels(ceiling.pixels(m, truth)), palette)
            if part is not None:
                sums[m] = sums.get(m, 0) + part
    return {m: MODALITIES[m].mean(total, count, palette) for m, total in sums.items()}


class MeanMap:
    """The predictor of the same maps for every frame: mean_of's, made when they are first needed."""

    def __init__(self, source, ceiling, palette):
        self.of = source, ceiling, palette

    @functools.cached_property
    def maps(self):
        return mean_of(*self.of)

    def __call__(self, frames):
        return [{m: MODALITIES[m].resize(map_, frame.truth[m].shape[:2])
                 for m, map_ in self.maps.items() if m in frame.truth} for frame in frames]


# ------------------------------------------------------------------------------------------------

def evaluate(source, predictors, rules, batch_size=16, save=None):
    """Score predictors {name: predictor} on a source's frames, shared out over the processes -> {name:
    {modality: Metric}}, the same on all.

    save(frame, maps), if given, is called with what the first predictor gave. Raises InputError for truth
    that cannot be read and for predictions that cannot be scored.
    """
    rank, world = place()
    scored = {name: metrics_of(source.modalities, rules) for name in predictors}
    total, first = len(source.names), next(iter(predictors))
    with tqdm(total=total, desc="evaluate", disable=rank > 0) as bar:
        for block in share(range(total), rank, world, batch_size):
            frames = [source.frame(i) for i in block]
            for name, predict in predictors.items():
                for frame, maps in zip(frames, predict(frames)):
                    for m, metric in scored[name].items():
                        if m in maps:
                            metric.add(frame.index, frame.name, frame.truth[m], maps[m])
                    if save and name == first:
                        save(frame, maps)
            bar.update(len(block) * world)
    for metrics in scored.values():
        for metric in metrics.values():
            metric.merge()
    barrier()
    return scored


# ------------------------------------------------------------------------------------------------
# Pictures.

def panels_of(metrics, frame, maps):
    """{modality: panels} of a frame's maps that can be compared."""
    panels = {m: metrics[m].panels(truth, maps[m]) for m, truth in frame.truth.items() if m in maps}
    return {m: found for m, found in panels.items() if found}


def compared(metrics, frame, maps):
    """A frame and its maps as a line of a grid: {label: picture}."""
    line = {} if frame.rgb is None else {"rgb": frame.rgb}
    for m, panels in panels_of(metrics, frame, maps).items():
        line |= {f"{m}\n({part})": image for part, image in zip(("truth", "prediction", "error"), panels)}
    return line


def draw_samples(samples, modalities, title, cell=96):
    """A labelled grid of pixels (n, M, 3, H, W), each modality as it looks."""
    rows = []
    for sample in samples:
        rows.append({f"{m}\n({title})": MODALITIES[m].picture(MODALITIES[m].from_pixels(pixels))
                     for m, pixels in zip(modalities, sample)})
    return draw_grid(rows, cell)


def draw_sheet(grids):
    """Grids of one size on one sheet, two in a line."""
    width, height = grids[0].size
    sheet = Image.new("RGB", (width * 2, height * ((len(grids) + 1) // 2)), "white")
    for i, grid in enumerate(grids):
        sheet.paste(grid, (i % 2 * width, i // 2 * height))
    return sheet


# ------------------------------------------------------------------------------------------------
# A run that is being trained; for what an objective brings see train.MMGen.

def preview(objective, network, path):
    """Four rows of the cache, their class told: generated, from what may be given, and as they are."""
    cache, device, channels = objective.cache, objective.device, network.latent_channels
    rows = cache.rows[:4]
    here = [m for m in network.modalities if m in cache.modalities]
    batch = {stem: x.to(device) for stem, x in cache.gather(rows, ["labels", *here]).items()}
    blank = torch.zeros(len(rows), channels, *network.latent_size, device=device)
    data = {m: latents(batch[m], blank, cache.meta) if m in here else blank for m in network.modalities}
    drawings = {"generate": {}, **{f"{m} given": {m: data[m]} for m in objective.conditions if m in here}}
    encoder, grids = encoder_of(cache.meta, device), []
    for title, given in drawings.items():
        noise = samplers.Noise(0, range(len(rows)), device)
        x = objective.draw(network, batch["labels"], given, noise)
        samples = samplers.decode(encoder, x).cpu().numpy()
        grids.append(draw_samples(samples, network.modalities, title))
    samples = samplers.decode(encoder, torch.cat([data[m] for m in network.modalities], 1)).cpu().numpy()
    grids.append(draw_samples(samples, network.modalities, "data"))
    with whole_file(path) as file:
        draw_sheet(grids).save(file, "png")


def seen_class(rgb, seg):
    """The toy world's class that pixels (3, H, W) of both show, -1 for none."""
    image, colours = MODALITIES["rgb"].from_pixels(rgb), MODALITIES["seg"].from_pixels(seg)
    return toy_scenes.class_of(image, nearest_colour(colours, toy_scenes.PALETTE))


class Trial:
    """What a run is judged by while it trains: its maps of a source's frames, and on the toy world the class
    of what it draws.

    Raises InputError where the objective predicts nothing that the source has the truth of.
    """

    def __init__(self, source, objective):
        self.source, self.objective, self.meta = source, objective, objective.meta
        known = objective.predicts
        source.modalities = [m for m in source.modalities if m in known]
        check(source.modalities, f"--eval-every: there is no truth of what is predicted of the RGB "
              f"({', '.join(known) or 'nothing'})")
        for i in range(len(source.names) if isinstance(source, Files) else 0):
            source.frame(i)  # a file that cannot be read ends a run before it begins
        self.encoder = encoder_of(self.meta, objective.device)
        target = shown_of(self.meta, "the cache's meta.json").depth_target
        self.rules = Rules(target, seg_mode=source.seg_mode, palette=source.palette, void=source.void)

    def score(self, network, path):
        """-> {score: value}, the same on all processes; path: a picture of the first four frames."""
        source, metrics = self.source, metrics_of(self.source.modalities, self.rules)
        predict = self.objective.predictor(network, self.encoder, metrics)
        scored = evaluate(source, {"value": predict}, self.rules)["value"]
        if place()[0] == 0:
            frames = [source.frame(i) for i in range(min(4, len(source.names)))]
            lines = [compared(scored, frame, maps) for frame, maps in zip(frames, predict(frames))]
            with whole_file(path) as file:
                draw_grid(lines).save(file, "png")
        found = results(scored)
        if isinstance(source, Toy) and self.meta["class_names"] == list(toy_scenes.CLASSES):
            found |= self.classes(network, len(source.names))
        return found

    def classes(self, network, count):
        """{"class": the share of `count` drawn scenes, of each class in turn, that show it}; {} without
        segments, or of a network that reads no classes.
        """
        if "labels" not in self.objective.reads or not {"rgb", "seg"} <= set(network.modalities):
            return {}
        rank, world = place()
        hits, device = [], self.objective.device
        wanted = [network.modalities.index(m) for m in ("rgb", "seg")]
        for block in share(range(count), rank, world, 16):
            y = torch.tensor(block, device=device) % len(toy_scenes.CLASSES)
            x = self.objective.draw(network, y, {}, samplers.Noise(0, block, device))
            samples = samplers.decode(self.encoder, x, wanted).cpu().numpy()
            hits += [seen_class(*pixels) == label for label, pixels in zip(y.tolist(), samples)]
        return {"class": float(np.mean(sum(gather(hits), [])))}


class Watch:
    """Looks at a run's EMA while it trains: previews every so many steps and, if asked, a Trial.

    toy, a number of held-out scenes, or data, a folder tree, are what it is scored on. Raises InputError
    where that is not said, or cannot be.
    """

    def __init__(self, objective, folder, preview_every, eval_every=0, toy=None, data=None):
        self.objective, self.folder, self.trial = objective, folder, None
        self.preview_every, self.eval_every = preview_every, eval_every
        check(bool(toy) + bool(data) == (eval_every > 0),
              "--eval-every N goes with --eval-toy K or --eval-data TREE")
        if eval_every:
            source = Toy(toy) if toy else Tree(data, objective.meta, facts_of(data))
            self.trial = Trial(source, objective)

    def look(self, network, step):
        """-> {score: value}, {} where none are due, the same on all processes; the seconds that it took.

        Writes FOLDER/<step>.png and, of a Trial, FOLDER/<step>_eval.png.
        """
        start, scores = time.perf_counter(), {}
        if step % self.preview_every == 0 and place()[0] == 0:
            try:
                preview(self.objective, network, self.folder / f"{step:07d}.png")
            except InputError as error:  # the autoencoder is not here: training does not need it
                print(f"no preview: {error}")
        if self.trial and step % self.eval_every == 0:
            scores = self.trial.score(network, self.folder / f"{step:07d}_eval.png")
            scores["eval_s"] = time.perf_counter() - start
        return scores, time.perf_counter() - start
