"""Draw the pictures of demo/ with the bundled weights, those of the pages about them.

    python studies/gallery.py                                       # all that need no run
    python studies/gallery.py --real data/real runs/real/rooms-long_0    # studies/run_real.sh made both
    python studies/gallery.py --mt runs/mt-study                         # studies/run_mt.sh made it

A picture that is not drawn stays as it is.
"""
import pathlib
import tempfile

import numpy as np
from PIL import Image
from record import ROOT, call

import eval_depth
import mt_sample
import prep_latents
import sample
import toy_scenes
import train
from distributed import check, command_parser, run
from weights import DEMO

WEIGHTS = "--ckpt", DEMO / "mmgen.pt"
FEW = "--sampler", "euler", "--steps", 2
LINE = 132  # pixels of a line of a grid
WHOLE = "understand", "mesh", "real"  # the others have 256 colours: demo/ is at most 15 MB


def stacked(*pictures):
    """Pictures below each other, each in the middle."""
    width = max(picture.width for picture in pictures)
    sheet = Image.new("RGB", (width, sum(picture.height for picture in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, ((width - picture.width) // 2, top))
        top += picture.height
    return sheet


def in_a_row(*pictures, apart=24):
    """Pictures beside each other, from the top."""
    width = sum(picture.width for picture in pictures) + apart * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + apart
    return sheet


def understand(folder, args):
    """README.md's first: what its first command writes."""
    call(sample, "--task", "understand", *WEIGHTS, "--out", folder)
    return Image.open(folder / "grid.png")


def generate(folder, args):
    """A scene of each class."""
    call(sample, "--task", "generate", "--classes", "balanced", "--num", 12, "--cfg", 2, "--sampler", "euler",
         "--steps", 50, *WEIGHTS, "--out", folder)
    return Image.open(folder / "grid.png")


def tasks(folder, args):
    """The preview of a training that changes nothing: each task on four held-out scenes."""
    call(prep_latents, "--toy", 4, "--toy-start", toy_scenes.HELD_OUT + 16, "--no-dino",
         "--out", folder / "cache")
    call(train, "--data", folder / "cache", "--init", DEMO / "mmgen.pt", "--ema-from-init", "--model", "T/2",
         "--mix", "photo", "--repa-weight", 0, "--lr", 1e-9, "--steps", 1, "--batch-size", 4,
         "--preview-every", 1, "--run", folder / "run")
    return Image.open(folder / "run/previews/0000001.png")


def evaluate(folder, args):
    """Best, median and worst of 128 scenes."""
    call(eval_depth, "--toy", 128, *WEIGHTS, *FEW, "--batch-size", 64, "--out", folder)
    return Image.open(folder / "grid.png")


def mesh(folder, args):
    """Depth given, all else drawn, and the object from three sides."""
    depth = sorted((DEMO / "scenes/depth").glob("*.png"))[1]
    call(sample, "--task", "condition", "--given", "depth", "--image", depth, "--mesh", "--focal", 1.2,
         "--sampler", "euler", "--steps", 25, *WEIGHTS, "--out", folder)
    return stacked(Image.open(folder / "grid.png"), Image.open(folder / "mesh" / depth.name))


def real(folder, args):
    """Best, median and worst held-out frame of the living room, one of the two of each."""
    data, checkpoint = args.real
    call(eval_depth, "--data", data / "livingroom-test", "--ckpt", checkpoint, *FEW, "--batch-size", 16,
         "--out", folder)
    grid = Image.open(folder / "grid.png")
    head = grid.height % LINE
    tops = [head + line * LINE for line in (0, 2, 4)]
    return stacked(grid.crop((0, 0, grid.width, head)),
                   *(grid.crop((0, top, grid.width, top + LINE)) for top in tops))


def mt(folder, args):
    """RGB to segmentation; ten squares restored; images with their labels; images for the scenes' vectors."""
    scenes = folder / "scenes"
    call(toy_scenes, "--num", 4, "--out", scenes)
    vectors = [toy_scenes.teacher(toy_scenes.render(toy_scenes.HELD_OUT + i), 1)[0] for i in range(4)]
    np.save(folder / "vectors.npy", np.stack(vectors).astype(np.float32))
    tasks = {"pair": ["translate", "--image", scenes],
             "masked": ["restore", "--image", scenes, "--patches", 10],
             "label": ["generate", "--num", 4],
             "feature": ["generate", "--features", folder / "vectors.npy"]}
    for name, task in tasks.items():
        call(mt_sample, "--task", *task, "--ckpt", args.mt / f"{name}_0", "--steps", 50, "--out",
             folder / name)
    return in_a_row(*(Image.open(folder / name / "grid.png") for name in tasks))


PICTURES = {make.__name__: make for make in (understand, generate, tasks, evaluate, mesh, real, mt)}
RUNS = "real", "mt"  # pictures that need runs, by their flags


def main():
    parser = command_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PICTURES), help="default: all")
    parser.add_argument("--real", nargs=2, type=pathlib.Path, metavar=("DATA", "RUN"))
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "demo")
    parser.add_argument("--mt", type=pathlib.Path, metavar="RUNS")
    args = parser.parse_args()
    names = args.only or [name for name in PICTURES if name not in RUNS or getattr(args, name)]
    for name in RUNS:
        check(getattr(args, name) or name not in names, f"--only {name}: needs --{name}")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            picture = PICTURES[name](pathlib.Path(folder), args)
            picture = picture.convert("RGB")
            picture = picture if name in WHOLE else picture.quantize(256, kmeans=3)
            picture.save(args.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    run(main)
