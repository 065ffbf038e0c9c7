"""Stage 4: sample MMGen: generate, understand, condition, translate (Fig. 1 and 5).

    python sample.py --task understand                                 # the bundled scenes
    python sample.py --task understand --image photo.jpg --ckpt runs/mmgen
    python sample.py --task generate --class-id 207 --num 8 --cfg 1.8 --cfg-interval 0 0.7
    python sample.py --task condition --given depth --image depth.png --mesh # its object as a PLY (Fig. 6)
    python sample.py --task translate --image photo.jpg                # RGB -> modalities -> an RGB from each

--ckpt defaults to the newest run, else the bundled demo. Under torchrun the samples are shared out. Noise is
seeded per sample by (seed, index): the same pictures whatever the batch size and the number of processes.
Writes OUT/<folder>/<stem>.png (and .npy of depth, normals), OUT/grid.png and OUT/meta.json.
"""
import functools
import itertools
import pathlib
from typing import NamedTuple

import numpy as np
import torch

import samplers
from distributed import (InputError, barrier, check, check_folder, check_ranges, check_read, command_parser,
                         prefetch, run, setup)
from images import as_it_is, centre_crop, filter_of, nearest_colour, segments
from locks import only_writer
from mesh import FOCALS, pick_segment, write_mesh
from mix import tell_untrained
from modalities import MODALITIES, PLAIN_SHOWN, check_target, check_turned, shown_of
from produce import (Maps, finish, folders_read, produce, read_rgb_file, write_grid, write_npz,
                     write_panels)
from trees import beside, classes_of, facts_of, find_files, flat_name, picture_folder, recorded
from vae import encoder_of
from weights import DEMO, load_model, newest_checkpoint

TASKS = ("generate", "understand", "condition", "translate")
READERS = {"classes": TASKS[:1], "fit": TASKS[1:], "given_time": TASKS[1:], "depth_space": ("condition",)}
MOST_TOKENS = 2 ** 14  # of a picture with --fit full


# ------------------------------------------------------------------------------------------------
# Requests: what is to be sampled.

class Request(NamedTuple):
    index: int   # global: seeds the noise
    stem: str    # of its outputs
    label: int   # class; num_classes: none
    files: dict  # {given modality: path}


def check_classes(class_ids, num_classes):
    """Raise InputError for classes that the checkpoint does not have."""
    check(num_classes or not class_ids, f"--class-id {class_ids}: this checkpoint has no classes; leave it "
          "out")
    for label in class_ids or ():
        check(0 <= label <= num_classes, f"--class-id {label}: this checkpoint has classes 0 to "
              f"{num_classes - 1} ({num_classes} is the null class)")


def of_classes(class_ids, classes, num, num_classes, seed):
    """Requests of `generate`: num of each class, or num of random or balanced ones."""
    count = num or 8
    if class_ids:
        labels = [label for label in class_ids for _ in range(num or 1)]
    elif classes == "balanced":
        check(num_classes, "--classes balanced: this checkpoint has no classes; leave it out")
        labels = [i % num_classes for i in range(count)]
    else:  # where there are no classes, 0 is the null class
        labels = np.random.default_rng(seed).integers(0, max(1, num_classes), count).tolist()
    return [Request(i, f"{i:06d}", label, {}) for i, label in enumerate(labels)]


def labels_of(location, stems, meta):
    """{stem: class} of pictures: what their folders name, num_classes where they do not; a single file has
    none.
    """
    none, names = meta["num_classes"], meta["class_names"]
    if not location.is_dir():
        return dict.fromkeys(stems, none)
    folders = {stem: pathlib.PurePosixPath(stem).parent.as_posix() for stem in stems}
    if "." not in names:  # else of a tree without class folders
        own = location.resolve().name  # it may be a class's own folder
        folders = {stem: own if folder == "." else folder for stem, folder in folders.items()}
    known = classes_of(set(folders.values()), names)
    return {stem: none if known[folder] is None else known[folder] for stem, folder in folders.items()}


def of_pictures(given, locations, label, num, meta):
    """Requests of pictures: locations are a file or folder for each of the given modalities.

    label: of all; None: each picture's folder names it, if it is a class. Files of several modalities belong
    together by their stems, single files by their order.
    """
    found = {m: find_files(location) for m, location in zip(given, locations)}
    labels = labels_of(locations[0], found[given[0]], meta)
    single, requests = not any(location.is_dir() for location in locations), []
    for stem, path in found[given[0]].items():
        files = {m: next(iter(found[m].values())) if single else found[m].get(stem) for m in given}
        for m, file in files.items():
            check(file, f"{path}: no file with this stem in {locations[given.index(m)]} for --given {m}")
        for k in range(num):
            name = flat_name(stem + (f"_{k}" if num > 1 else ""))
            requests.append(Request(len(requests), name, labels[stem] if label is None else label, files))
    stems = [request.stem for request in requests]
    if len(set(stems)) < len(stems):
        twice = max(set(stems), key=stems.count)
        raise InputError(f"--image {locations[0]}: two pictures share the stem {twice}; rename one")
    return requests


def fit_of(mode, resolution, unit):
    """The fit to the network's size: ADM's centre crop, or the whole picture in multiples of unit."""
    def crop(image, nearest=False):
        return centre_crop(image, resolution, nearest)

    def full(image, nearest=False):
        scale = resolution / min(image.size)
        width, height = (max(unit, round(side * scale / unit) * unit) for side in image.size)
        tokens = width * height // unit ** 2
        check(tokens <= MOST_TOKENS, f"--fit full of {image.width}x{image.height}: {tokens} tokens, "
              f"at most {MOST_TOKENS}; use --fit crop")
        return image.resize((width, height), filter_of(image, nearest))
    return crop if mode == "crop" else full


class Input(NamedTuple):
    """The files of a request, read once."""
    pixels: dict  # {modality: (3, fH, fW)} at the network's size
    whole: dict   # {modality: (3, H, W)} as they are to be written
    shape: tuple  # (H, W) of its outputs, None for the network's


def read_input(request, fit, full, facts, shown):
    """Read a request's files; full: outputs are of their size; facts {modality: Facts} of them; shown: how
    the network is shown them.

    Raises InputError where maps do not align.
    """
    pixels, whole, shape, rasters = {}, {}, None, []
    own = PLAIN_SHOWN._replace(depth_target=shown.depth_target)  # outputs mean what the model's mean
    for m, path in request.files.items():
        row = MODALITIES[m]
        raster = row.open(path, facts[m])
        rasters.append(raster)
        whole[m] = row.pixels(raster, as_it_is if full else fit, own)  # as it was given
        alike = shown == own and not full
        pixels[m] = whole[m] if alike else row.pixels(raster, fit, shown)
        shape = raster.size[::-1] if full else None
        first = next(iter(pixels))
        check(pixels[m].shape == pixels[first].shape, f"{path}: its size does not match that of {first}; "
              "the maps must be aligned")
    check_turned(rasters)
    return Input(pixels, whole, shape)


# ------------------------------------------------------------------------------------------------
# Drawing.

class Drawing:
    """Draws all modalities of a request from what is given of it; back: a new RGB from each of them, too.

    read(request) -> Input. Subclasses override sample.
    """

    def __init__(self, model, encoder, sampling, seed, wanted, read, given=(), back=False):
        self.model, self.encoder, self.sampling, self.seed, self.read = model, encoder, sampling, seed, read
        self.given, self.back = given, back
        self.wanted = [m for m in model.modalities if m in wanted and m not in given]
        self.device = next(model.parameters()).device

    def __call__(self, batches):
        """Yield (request, maps {folder: pixels}, the shape of its outputs or None) of all requests."""
        ahead = 2 * max(map(len, batches), default=1)
        inputs = prefetch(self.read, itertools.chain(*batches), threads=8, ahead=ahead)
        for batch in batches:
            mine = list(itertools.islice(inputs, len(batch)))
            noise = samplers.Noise(self.seed, [request.index for request in batch], self.device)
            yield from self.sample(batch, mine, noise)

    def labels(self, batch):
        return torch.tensor([request.label for request in batch], device=self.device)

    def encoded(self, inputs, modality, noise):
        """The latents (N, C, H, W) of the requests' files of a modality."""
        pixels = torch.from_numpy(np.stack([one.pixels[modality] for one in inputs]))
        return self.encoder.encode(pixels.to(self.device), noise)

    def decoded(self, latents, modalities):
        """Pixels (N, len(modalities), 3, fH, fW) of latents (N, M*C, H, W)."""
        wanted = [self.model.modalities.index(m) for m in modalities]
        return samplers.decode(self.encoder, latents, wanted, self.sampling.precision).cpu().numpy()

    def sample(self, batch, inputs, noise):
        """Yield as __call__ does, for one batch."""
        y = self.labels(batch)
        given = {m: self.encoded(inputs, m, noise) for m in self.given}
        x = samplers.sample_latents(self.model, y, given, noise, self.sampling)
        drawn = [(self.wanted, x, self.wanted)] if self.wanted else []
        if self.back:
            for m, part in list(zip(self.model.modalities, x.split(self.encoder.channels, 1)))[1:]:
                new = samplers.sample_latents(self.model, y, {m: part}, noise, self.sampling)
                drawn.append(([f"{m}_to_rgb"], new, ["rgb"]))
        maps = [dict(one.whole) for one in inputs]
        for folders, latents, modalities in drawn:
            for found, pixels in zip(maps, self.decoded(latents, modalities)):
                found.update(zip(folders, pixels))
        for request, one, found in zip(batch, inputs, maps):
            yield request, found, one.shape


# ------------------------------------------------------------------------------------------------
# Truth beside what was given, and objects.

def truth_pictures(request, modalities, fit, facts, target="disparity"):
    """{modality: picture} of the ground truth beside a request's files, as far as it can be read; facts
    {given modality: Facts} of their tree; target: the model's depth_target.
    """
    own, files = PLAIN_SHOWN._replace(depth_target=target), request.files
    held = facts[next(iter(files))] if files else None
    pictures = {}
    for m, path in beside(files, modalities).items():
        row = MODALITIES[m]
        try:
            pixels = row.pixels(row.open(path, held), fit, own)
        except InputError as error:
            print(f"warning: ground truth left out of the grid: {error}")
        else:
            pictures[m] = row.picture(row.from_pixels(pixels))
    return pictures


def write_object(request, out, palette, segment, focal):
    """OUT/mesh/<stem>.ply of a sample that is written: a segment's normals, integrated, in the colours of the
    RGB (Fig. 6).
    """
    rgb, seg = (read_rgb_file(out, m, request.stem) for m in ("rgb", "seg"))
    normal = np.load(out / "normal" / f"{request.stem}.npy")
    index = nearest_colour(seg, np.array(palette)) if palette else segments(seg)
    path = out / "mesh" / f"{request.stem}.ply"
    try:
        mask = pick_segment(index, segment)
    except InputError as error:
        print(f"warning: no mesh of {request.stem}: {error}")
        return
    vertices, faces = write_mesh(path, normal, mask, rgb, focal)
    print(f"{path}: {vertices} vertices, {faces} faces")


# ------------------------------------------------------------------------------------------------

def pixel(text):
    """X,Y -> (x, y)."""
    x, y = text.split(",")
    return int(x), int(y)


def add_flags(parser):
    """The flags of every command that draws samples into a folder."""
    parser.add_argument("--image", nargs="+", help="file, folder or tree, for each given modality")
    parser.add_argument("--class-id", type=int, nargs="+", help="default: random classes, or the folder's")
    parser.add_argument("--classes", choices=("random", "balanced"), default="random",
                        help="generate without --class-id: drawn, or all in turn")
    parser.add_argument("--num", type=int, help="per class or picture (1); without --class-id in all (8)")
    parser.add_argument("--out", type=pathlib.Path, help="default: samples/<task>")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace the samples of another command in OUT")
    parser.add_argument("--depth-space", choices=("disparity", "depth"),
                        help="what given depth files hold; default: what tree.json says, else disparity")
    parser.add_argument("--outputs", nargs="+", choices=list(MODALITIES), help="what to write; default all")
    parser.add_argument("--npz", action="store_true", help="also OUT/samples.npz, the RGB as ADM's arr_0")
    parser.add_argument("--truncate", action="store_true", help="cut to 8 bits as REPA does, not rounded")
    parser.add_argument("--fit", choices=("crop", "full"), default="crop",
                        help="full: the whole picture, maps at its size")


def check_flags(args):
    """Raise InputError for values of the shared flags that cannot be."""
    args.out = args.out or pathlib.Path("samples", args.task)
    check_ranges(args, num=(1, 10 ** 6))
    check(not (args.npz and args.fit == "full"), "--npz with --fit full: pictures of different sizes do not "
          "fit one array; use --fit crop")


def arguments():
    """The command's flags -> Namespace. InputError for those that contradict each other."""
    parser = command_parser(__doc__)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--given", nargs="+", choices=list(MODALITIES), help="conditions of --task condition")
    samplers.add_flags(parser)
    add_flags(parser)
    parser.add_argument("--panels", action="store_true", help="also OUT/panels/<stem>.png, all maps of each")
    parser.add_argument("--mesh", action="store_true", help="also OUT/mesh/<stem>.ply, an object's surface")
    parser.add_argument("--segment", type=pixel, metavar="X,Y",
                        help="--mesh: a pixel of the object; default: the largest segment off the border")
    parser.add_argument("--focal", type=float, metavar="HALF-WIDTHS", help="--mesh; default: orthographic")
    args = parser.parse_args()
    check_read(parser, args, READERS)
    check_flags(args)
    check(args.mesh or not (args.segment or args.focal), "--segment and --focal belong to --mesh")
    check_ranges(args, focal=FOCALS)
    check(args.task != "condition" or args.given, "--task condition needs --given MODALITY and --image FILE")
    check(args.task == "condition" or not args.given, f"--given with --task {args.task}: "
          "--given belongs to --task condition")
    check(args.task != "generate" or not args.image, "--image with --task generate: use --task condition "
          "--given MODALITY, or understand")
    return args


def given_of(task, given, modalities):
    """The conditions of a task. Raises InputError for what the checkpoint does not have."""
    given = tuple(given or (() if task == "generate" else ("rgb",)))
    check(len(set(given)) == len(given), f"--given {' '.join(given)}: a modality is there twice")
    for m in given:
        check(m in modalities, f"--given {m}: this checkpoint takes {', '.join(modalities)}")
    return given


def outputs_of(outputs, modalities, needed):
    """The modalities to write. needed {flag: modalities that it cannot do without}."""
    wanted = [m for m in modalities if m in (outputs or modalities)]
    lost = [m for m in outputs or () if m not in modalities]
    check(not lost, f"--outputs {' '.join(lost)}: this checkpoint has {', '.join(modalities)}")
    for flag, names in needed.items():
        lost = [m for m in names if m not in wanted]
        check(not lost, f"{flag} needs {', '.join(names)}: {', '.join(lost)} is "
              f"{'not among --outputs' if outputs else 'not of this checkpoint'}")
    return wanted


def locations_of(images, given, task):
    """The file or folder of pictures of each of the given modalities; a tree serves them all."""
    if images is None and task == "understand":
        images = [DEMO / "scenes"]
    if images and len(images) == 1 and pathlib.Path(images[0]).is_dir():
        images = images * len(given)
    check(images and len(images) == len(given), f"--task {task}: needs --image with {len(given)} file(s) or "
          f"folder(s), for {', '.join(given)}, or one tree")
    return [picture_folder(location, m) for location, m in zip(images, given)]


def facts_for(given, locations, depth_space, meta, shown):
    """{given modality: Facts of its files}: labels are in the checkpoint's colours where nobody says it.

    Raises InputError for depth that cannot be shown as the checkpoint has it.
    """
    facts = {}
    for m, location in zip(given, locations):
        facts[m] = facts_of(location, depth_space)
        if m == "depth":
            check_target(location, facts[m], shown.depth_target)
        if facts[m].palette is None and meta["palette"]:
            facts[m] = facts[m]._replace(palette=np.array(meta["palette"], np.uint8))
    return facts


def tell_depth(facts, shown, wanted):
    """Print how the given depth files are read, and what depth means where it is no disparity."""
    if "depth" in facts:
        print(f"depth files hold {facts['depth'].depth_space} ({facts['depth'].said}), the model speaks "
              f"{shown.depth_target}; --depth-space says otherwise")
    if "depth" in wanted and shown.depth_target != PLAIN_SHOWN.depth_target:
        print(f"depth comes out as {MODALITIES['depth'].meant(shown)} (depth_target {shown.depth_target})")


def main():
    """Sample what the flags ask for, shared out over the processes; what is there already is kept."""
    args = arguments()
    sampling = samplers.from_flags(args, args.task)
    rank, world, device = setup()
    loaded = load_model(args.ckpt or newest_checkpoint(), device)
    model, meta = loaded.model, loaded.meta
    shown = shown_of(meta, loaded.path)
    samplers.check_model(loaded, sampling)
    samplers.make_fast(model, args.precision, args.compile)
    encoder = encoder_of(meta, device, args.vae)
    given = given_of(args.task, args.given, model.modalities)
    tell_untrained(loaded, given)
    back = args.task == "translate"
    check(args.task == "generate" or len(given) < len(model.modalities), f"{loaded.path}: has "
          f"{', '.join(model.modalities)} alone; --task {args.task} would predict nothing")
    needs = (("--mesh", args.mesh, ("rgb", "normal", "seg")), ("--npz", args.npz, ("rgb",)),
             ("--task translate", back, ("rgb",)))
    needed = {flag: names for flag, asked, names in needs if asked}
    wanted = outputs_of(args.outputs, model.modalities, needed)
    classes = meta["num_classes"]
    check_classes(args.class_id, classes)
    facts, locations = {}, []
    if given:
        check(len(args.class_id or ()) < 2, f"--class-id {args.class_id}: give one class for all pictures")
        label = args.class_id[0] if args.class_id else None
        locations = locations_of(args.image, given, args.task)
        requests = of_pictures(given, locations, label, args.num or 1, meta)
        facts = facts_for(given, locations, args.depth_space, meta, shown)
    else:
        requests = of_classes(args.class_id, args.classes, args.num, classes, args.seed)
    if rank == 0:
        print(f"{loaded.path}: {', '.join(model.modalities)}, {classes} classes, step {loaded.step}; "
              f"{len(requests)} samples on {device}")
        tell_depth(facts, shown, wanted)
        without = sum(request.label == classes for request in requests)
        if given:
            told = len(requests) - without
            print(f"{told} of {len(requests)} pictures are told their class, {without} have none")
        if args.cfg != 1.0 and without:
            print(f"warning: --cfg {args.cfg} has no effect on pictures without a class"
                  f"{'; give --class-id' if classes else ''}")

    full = args.fit == "full"
    fit = fit_of(args.fit, meta["resolution"], model.patch_size * encoder.factor)
    read = functools.partial(read_input, fit=fit, full=full, facts=facts, shown=shown)
    draw = Drawing(model, encoder, sampling, args.seed, wanted, read, given, back)
    folders = {m: MODALITIES[m] for m in wanted}
    if back:
        folders.update({f"{m}_to_rgb": MODALITIES["rgb"] for m in model.modalities[1:]})
    outputs = Maps(folders, args.truncate)
    asked = {"mesh": args.mesh and [".ply", ".png"], "panels": args.panels and [".png"]}
    outputs.extras = {folder: endings for folder, endings in asked.items() if endings}
    recipe = None if rank > 0 else dict(
        task=args.task, given=given, **sampling.recipe(loaded, encoder, args.seed),
        fit=args.fit, truncate=args.truncate, outputs={m: MODALITIES[m].meant(shown) for m in wanted},
        endings=outputs.endings, depth_target=shown.depth_target, reading=recorded(facts),
        palette=meta["palette"])
    check_folder(args.out, folders_read(locations, requests))
    labels = {name: f"{name} (given)" if name in given else name.replace("_", " ") for name in folders}
    labels = {name: labels[name] for name in (*given, *folders) if name in labels}  # the given first
    truth = functools.partial(truth_pictures, modalities=model.modalities, fit=fit, facts=facts,
                              target=shown.depth_target)
    with only_writer(args.out):
        drawn = produce(args.out, requests, draw, outputs, recipe, 1 if full and given else args.batch_size,
                        meta["class_names"], args.overwrite)
        for request in requests[rank::world] if args.mesh else ():
            write_object(request, args.out, meta["palette"], args.segment, args.focal)
        if args.panels:
            write_panels(args.out, requests[rank::world], drawn, labels, truth)
        barrier()
        if rank == 0:
            write_grid(args.out, requests, drawn, labels, truth)
            if args.npz or (args.out / "samples.npz").exists():  # of all, when some are added
                write_npz(args.out)
            finish(args.out)
            print(args.out / "grid.png")


if __name__ == "__main__":
    run(main)
