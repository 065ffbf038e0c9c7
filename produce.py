"""A folder of samples: drawn in batches, written in threads. The same command continues; other inputs are
added by a command of the same recipe.

    OUT/<folder>/<stem>.png, ...   what a command's outputs say
    OUT/meta.json                  the recipe, each sample, and whether they are complete
"""
import collections
import concurrent.futures
import functools
import json
import os
import zipfile

import numpy as np
from PIL import Image
from tqdm import tqdm

from distributed import barrier, check, gather, place, prefetch, reading, sha256, share, whole_file
from images import draw_grid, enlarge

SHOWN = 12  # rows of the grid
OLDER = {"given_time": 0.995, "middle_scale": 1.0, "depth_target": "disparity"}  # what older ones mean
STATE = ("samples", "complete", "scores", "extras")  # of meta.json; the rest is the recipe
WHOLE = ("grid.png", "samples.npz")  # files of OUT that show all samples


# ------------------------------------------------------------------------------------------------
# meta.json.

def read_meta(out):
    """meta.json of a folder of samples; {} where there is none. InputError for anything else's."""
    path = out / "meta.json"
    if not path.exists():
        return {}
    with reading(path, "use another --out"):
        meta = json.loads(path.read_text())
    check(isinstance(meta, dict) and "complete" in meta, f"{path}: is not of samples; use another --out")
    meta = {"samples": [], **meta}
    check(_names_own(meta), f"{path}: names its samples in another way than here, or files outside of {out}; "
          "use another --out")
    return meta


def _names_own(meta):
    """Whether what a meta.json says of its files is of our form, and they all lie in its folder."""
    samples, folders = meta["samples"], [meta.get("endings", {}), meta.get("extras", {})]
    formed = isinstance(samples, list) and all(isinstance(found, dict) for found in folders)
    if not formed or not all(isinstance(ends, list) for found in folders for ends in found.values()):
        return False
    for sample in samples:
        there = isinstance(sample, dict) and sample.keys() >= {"stem", "class_id", "given"}
        if not there or not all(isinstance(sample.get(key, {}), dict) for key in ("given", "sha256")):
            return False
    names = [sample["stem"] for sample in samples]
    names += [name for found in folders for folder, ends in found.items() for name in (folder, *ends)]
    return all(isinstance(name, str) and "/" not in name and name.strip(".") for name in names)


def write_meta(out, meta):
    """Write OUT/meta.json."""
    with whole_file(out / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())


def finish(out, **state):
    """Say in meta.json that the samples are complete, if no other command has left some undone."""
    meta = read_meta(out)
    lost = [sample["stem"] for sample in meta["samples"]
            if not all(path.is_file() for path in files_of(out, sample["stem"], meta["endings"]))]
    if lost:
        print(f"{out}: {len(lost)} samples of an interrupted command are missing (the first: {lost[0]}); "
              "run that one again")
    write_meta(out, {**meta, **state, "complete": not lost})


def files_of(out, stem, endings):
    """The files of a sample; endings {folder: [...]}."""
    return [out / folder / f"{stem}{end}" for folder, ends in endings.items() for end in ends]


def all_files(out, meta):
    """Every file that a meta.json names."""
    endings = meta.get("endings") or {m: [".png", ".npy"] for m in meta.get("outputs", ())}  # an older one
    endings = {**endings, **meta.get("extras", {"mesh": [".ply", ".png"]})}
    files = [path for sample in meta["samples"] for path in files_of(out, sample["stem"], endings)]
    return files + [out / name for name in WHOLE] if meta["samples"] else []


def folders_read(locations, requests):
    """The folders whose pictures are read, those behind links, too; none of single files."""
    walked = [location for location in locations if location.is_dir()]
    inner = {path.parent for request in requests for path in request.files.values()} if walked else ()
    return [*walked, *inner]


# ------------------------------------------------------------------------------------------------
# What is there, and what is left.

def entries_of(requests, class_names):
    """meta.json's list of samples: what each was drawn of, its files by their content."""
    paths = sorted({path for request in requests for path in request.files.values()})

    def digest(path):
        with reading(path, "give another file"):
            return sha256(path)

    digests = dict(zip(paths, prefetch(digest, paths, threads=8, ahead=64)))
    entries = []
    for request in requests:
        name = class_names[request.label] if request.label < len(class_names) else None
        entries.append(dict(
            stem=request.stem, index=request.index, class_id=request.label, class_name=name,
            given={m: os.path.abspath(path) for m, path in request.files.items()},
            sha256={m: digests[path] for m, path in request.files.items()}))
    return entries


def first_difference(old, new):
    """The first setting of two recipes that differs, in words; None where they are the same."""
    new = json.loads(json.dumps(new))
    for key in (*new, *old):
        before = old.get(key, OLDER.get(key))
        if key not in STATE and before != new.get(key):
            return f"{key} was {str(before)[:60]}, is {str(new.get(key))[:60]}"
    return None


def taken(old, new):
    """Why the samples `new` cannot stand beside those of the same name in `old`; None where they can."""
    for entry in new:
        other = old.get(entry["stem"], entry)
        if other["class_id"] != entry["class_id"]:
            return f"{entry['stem']} was of class {other['class_id']}, is of {entry['class_id']}"
        for m, path in entry["given"].items():
            same = path == other["given"].get(m) or entry["sha256"][m] == other.get("sha256", {}).get(m)
            if not same:
                return f"the name {entry['stem']} is taken by {other['given'].get(m)}, not {path}"
    return None


def take_up(out, recipe, requests, class_names, outputs, overwrite):
    """Prepare OUT -> the requests still to be drawn: without outputs, or of inputs that have changed.

    Raises InputError where OUT holds samples of another recipe or of other inputs under the same names
    (overwrite: they are removed), files that are not its own, or what is read.
    """
    meta, entries = read_meta(out), entries_of(requests, class_names)
    old = {sample["stem"]: sample for sample in meta.get("samples", ())}
    clash = meta and (first_difference(meta, recipe) or taken(old, entries))
    check(not clash or overwrite, f"{out}: holds samples of another command ({clash}); use another --out, or "
          "--overwrite to replace them")
    own = all_files(out, meta) if meta else []
    extras = {**meta.get("extras", {}), **outputs.extras}
    endings = {**outputs.endings, **extras}
    planned = [path for request in requests for path in files_of(out, request.stem, endings)]
    read = {os.path.realpath(path) for request in requests for path in request.files.values()}
    for path in (*planned, *own):
        check(os.path.realpath(path) not in read, f"--out {out}: {path} would be overwritten, and is given; "
              "use another folder")
    foreign = {*planned, *(out / name for name in WHOLE)} - set(own)
    for path in sorted(foreign):
        check(not path.exists(), f"{path}: is there, and no sample of {out / 'meta.json'}; use another --out")
    if clash:
        print(f"{out}: {len(old)} samples are replaced ({clash})")
        for path in own:
            path.unlink(missing_ok=True)
        old, extras = {}, outputs.extras

    def is_there(entry):
        same = old.get(entry["stem"], {}).get("sha256") == entry["sha256"]
        return same and all(path.is_file() for path in files_of(out, entry["stem"], outputs.endings))

    there = [is_there(entry) for entry in entries]
    if any(there):
        print(f"{out}: {sum(there)} of {len(there)} samples are there")
    for entry, kept in zip(entries, there):
        if entry["stem"] in old and not kept:  # what was made of its maps is of others now
            for path in files_of(out, entry["stem"], extras):
                path.unlink(missing_ok=True)
    # What stays keeps its entry, too: the index of its noise may be another one now.
    samples = {**old, **{entry["stem"]: entry for entry, kept in zip(entries, there) if not kept}}
    write_meta(out, {**recipe, "extras": extras, "samples": list(samples.values()), "complete": False})
    return [request for request, kept in zip(requests, there) if not kept]


def produce(out, requests, draw, outputs, recipe, batch_size, class_names=(), overwrite=False):
    """Draw what OUT lacks of the requests, in batches shared out over the processes, and write it.

    draw(batches) yields (request, maps, shape) of all their requests; outputs.endings {folder: [...]} are
    the files of each, outputs.extras those that some have; outputs.write(out, request, maps, shape) writes
    them, in threads, and returns {folder: picture}. Returns {index: pictures} of what this process has
    drawn, for the grid's rows; None for others. recipe is process 0's. OUT is not complete before finish
    says so. Raises InputError as take_up does.
    """
    rank, world = place()
    left = take_up(out, recipe, requests, class_names, outputs, overwrite) if rank == 0 else None
    left = gather(left)[0]
    batches, drawn, pending = share(left, rank, world, batch_size), {}, collections.deque()

    def settle(most):
        while len(pending) > most:
            index, writing = pending.popleft()
            pictures = writing.result()  # raises what went wrong in writing
            drawn[index] = pictures if index < SHOWN else None

    total = sum(map(len, batches))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # compressed while the device draws the next ones
        for request, maps, shape in tqdm(draw(batches), total=total, desc="sample", disable=rank > 0):
            pending.append((request.index, pool.submit(outputs.write, out, request, maps, shape)))
            settle(16)
        settle(0)
    barrier()
    return drawn


# ------------------------------------------------------------------------------------------------
# Files of a sample.

class Maps:
    """The outputs of requests: a picture, and an array where it is of floats, in a folder for each map.

    folders {name: row of MODALITIES}; truncate: cut to 8 bits in the place of rounding.
    """

    extras = {}  # {folder: endings} of files that only some samples have

    def __init__(self, folders, truncate=False):
        self.folders, self.truncate = folders, truncate
        self.endings = {name: [".png", ".npy"] if row.floats else [".png"] for name, row in folders.items()}

    def write(self, out, request, maps, shape):
        """Write {folder: pixels}, at the shape (H, W) if there is one -> {folder: picture}."""
        pictures = {}
        for name, row in self.folders.items():
            pixels = maps[name]
            if shape is not None and pixels.shape[1:] != tuple(shape):
                pixels = enlarge(pixels, tuple(shape), row.nearest)
            if self.truncate and not (row.floats or row.nearest):
                pixels = np.floor((pixels + 1) * 127.5 + 1e-4) / 127.5 - 1  # levels that are given stay
            array = row.from_pixels(pixels)
            pictures[name] = row.picture(array)
            with whole_file(out / name / f"{request.stem}.png") as file:
                Image.fromarray(pictures[name]).save(file, "png")
            if row.floats:
                with whole_file(out / name / f"{request.stem}.npy") as file:
                    np.save(file, array.astype(np.float32))
        return pictures


# ------------------------------------------------------------------------------------------------
# Pictures of all maps, and one array.

def read_rgb_file(out, folder, stem):
    """A picture that was written: by an earlier run, or by another process."""
    return np.asarray(Image.open(out / folder / f"{stem}.png").convert("RGB"))


def _row(out, request, drawn, folders, truth):
    """{label: picture} of a sample, and of the truth beside it, as of write_grid."""
    pictures = drawn.get(request.index)
    pictures = pictures or {name: read_rgb_file(out, name, request.stem) for name in folders}
    beside = {f"{m} (truth)": picture for m, picture in truth(request).items()} if truth else {}
    return {**{label: pictures[name] for name, label in folders.items()}, **beside}


def _save_rows(path, rows, cell=128):
    with whole_file(path) as file:
        draw_grid(rows, cell).save(file, "png")


def write_grid(out, requests, drawn, folders, truth=None):
    """OUT/grid.png, a row a request; folders {name: label}, truth(request) -> {modality: picture}."""
    _save_rows(out / "grid.png", [_row(out, request, drawn, folders, truth) for request in requests[:SHOWN]])


def write_panels(out, requests, drawn, folders, truth=None):
    """OUT/panels/<stem>.png of those that have none: the sample's row of write_grid's, at the maps' size."""
    def write(request):
        row = _row(out, request, drawn, folders, truth)
        largest = max(max(picture.shape) for picture in row.values())
        _save_rows(out / "panels" / f"{request.stem}.png", [row], max(128, largest))

    lost = [request for request in requests if not (out / "panels" / f"{request.stem}.png").is_file()]
    for _ in tqdm(prefetch(write, lost, threads=4, ahead=16), "panels", len(lost), disable=place()[0] > 0):
        pass


def write_npz(out):
    """OUT/samples.npz: the written RGB of all samples as arr_0 uint8 (N, H, W, 3), picture by picture."""
    stems = [sample["stem"] for sample in read_meta(out)["samples"]]
    stems = [stem for stem in stems if (out / "rgb" / f"{stem}.png").is_file()]
    first = read_rgb_file(out, "rgb", stems[0])
    header = dict(descr="|u1", fortran_order=False, shape=(len(stems), *first.shape))
    with whole_file(out / "samples.npz") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            read = functools.partial(read_rgb_file, out, "rgb")
            for image in tqdm(prefetch(read, stems, threads=4, ahead=64), total=len(stems), desc="npz"):
                array.write(image.tobytes())
