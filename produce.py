"""A folder of samples: drawn in batches, written in threads. The same command continues, another one
replaces.

    OUT/<folder>/<stem>.png, ...   what a command's outputs say
    OUT/meta.json                  what produced them, each sample, and whether they are complete
"""
import collections
import concurrent.futures
import functools
import json
import zipfile

import numpy as np
from PIL import Image
from tqdm import tqdm

from distributed import barrier, broadcast, check, place, prefetch, share, whole_file
from modalities import draw_grid

SHOWN = 12  # rows of the grid


def files_of(out, stem, endings):
    """The files of a sample; endings {folder: [...]}."""
    return [out / folder / f"{stem}{end}" for folder, ends in endings.items() for end in ends]


def take_up(out, recipe, requests, endings):
    """Prepare OUT -> the requests still to be drawn: those without outputs newer than their inputs.

    Samples of another recipe are removed at once, so that neither a later run nor an evaluation takes them
    for this one's. Raises InputError where OUT holds what is given, or is no folder of samples.
    """
    for request in requests:
        for path in request.files.values():
            check(out.resolve() not in path.resolve().parents, f"--out {out}: holds {path}, which is given; "
                  "use another folder")
    try:
        old = json.loads((out / "meta.json").read_text())
    except FileNotFoundError:
        old = {}
    except (OSError, ValueError):
        old = None
    check(old == {} or (isinstance(old, dict) and "complete" in old),
          f"{out / 'meta.json'}: is not of samples; use another --out")

    def there(request, path):
        if not path.is_file():
            return False
        return all(file.stat().st_mtime <= path.stat().st_mtime for file in request.files.values())

    same = {key: value for key, value in old.items() if key not in ("complete", "scores")}
    if same == json.loads(json.dumps(recipe)):
        left = [request for request in requests
                if not all(there(request, path) for path in files_of(out, request.stem, endings))]
        if len(left) < len(requests):
            print(f"{out}: {len(requests) - len(left)} of {len(requests)} samples are there; "
                  f"remove {out} to draw them again")
        if left:
            write_meta(out, recipe, complete=False)
        return left
    if old:
        print(f"{out}: replaces {len(old.get('samples', ()))} samples of another recipe")
        write_meta(out, {**old, "complete": False})
    endings = old.get("endings") or {m: [".png", ".npy"] for m in old.get("outputs", ())}
    for sample in old.get("samples", ()):
        for path in files_of(out, sample["stem"], {**endings, "mesh": [".ply", ".png"]}):
            path.unlink(missing_ok=True)
    for name in ("meta.json", "grid.png", "samples.npz"):
        (out / name).unlink(missing_ok=True)
    write_meta(out, recipe, complete=False)
    return requests


def sample_list(requests):
    """meta.json's list of samples."""
    return [dict(stem=request.stem, class_id=request.label,
                 given={m: str(path) for m, path in request.files.items()}) for request in requests]


def write_meta(out, recipe, **state):
    """OUT/meta.json: what produced the samples, and whether they are complete."""
    with whole_file(out / "meta.json") as file:
        file.write(json.dumps({**recipe, **state}, indent=1).encode())


def produce(out, requests, draw, outputs, recipe, batch_size):
    """Draw what OUT lacks of the requests, in batches shared out over the processes, and write it.

    draw(batches) yields (request, maps, shape) of all their requests; outputs.endings {folder: [...]} are
    the files of each, outputs.write(out, request, maps, shape) writes them, in threads, and returns
    {folder: picture}. Returns {index: pictures} of what this process has drawn, for the grid's rows; None
    for others. recipe is process 0's. OUT is not complete before write_meta says so.
    """
    rank, world = place()
    left = broadcast(take_up(out, recipe, requests, outputs.endings) if rank == 0 else None)
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
# Pictures of all, and one array.

def read_rgb_file(out, folder, request):
    """A picture that was written: by an earlier run, or by another process."""
    return np.asarray(Image.open(out / folder / f"{request.stem}.png").convert("RGB"))


def write_grid(out, requests, drawn, folders, truth=None):
    """OUT/grid.png, a row a request; folders {name: label}, truth(request) -> {modality: picture}."""
    rows, labels = [], []
    for request in requests[:SHOWN]:
        pictures = drawn.get(request.index) or {name: read_rgb_file(out, name, request) for name in folders}
        beside = {f"{m} (truth)": picture for m, picture in truth(request).items()} if truth else {}
        rows.append({**{label: pictures[name] for name, label in folders.items()}, **beside})
        labels += [label for label in rows[-1] if label not in labels]
    with whole_file(out / "grid.png") as file:
        draw_grid([[row.get(label) for label in labels] for row in rows], labels).save(file, "png")


def write_npz(out, requests):
    """OUT/samples.npz: the written RGB as arr_0 uint8 (N, H, W, 3), picture by picture."""
    first = read_rgb_file(out, "rgb", requests[0])
    header = dict(descr="|u1", fortran_order=False, shape=(len(requests), *first.shape))
    with whole_file(out / "samples.npz") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            read = functools.partial(read_rgb_file, out, "rgb")
            for image in tqdm(prefetch(read, requests, threads=4, ahead=64), total=len(requests), desc="npz"):
                array.write(image.tobytes())
