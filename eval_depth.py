"""Stage 5b: dense prediction: depth (Table 3), normals, segmentation, of a checkpoint or of predictions.

    python eval_depth.py --toy 256 --sampler euler --steps 2    # held-out toy scenes, with the VAE's ceiling
    torchrun --nproc_per_node=8 -- eval_depth.py --ckpt 0600000.pt --scannet scans --num 5000 --json t3.json
    python eval_depth.py --data DIR                             # <root>/{rgb,depth,normal,seg}/<class>/<name>
    python eval_depth.py --pred samples --gt truth --modality depth    # no model: files matched by stem

Ground truth is cropped to its centre square and never resampled; predictions are brought to its size. What
depth files hold is said by DIR/tree.json or --depth-space: disparity (of 8 or 16 bits, or floats) or depth
(floats in metres, 16 bits in millimetres), by default disparity of --data and depth of --gt. Depths outside
--depth-range and unknown pixels are not scored. Writes OUT/per_image.csv and OUT/grid.png (best, median and
worst cases).
"""
import csv
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import samplers
from distributed import (barrier, check, check_apart, check_folder, check_ranges, check_replaced,
                         command_parser, reading, run, setup, whole_file, write_json)
from evaluation import (Ceiling, Files, MeanMap, ModelPredictor, Pairs, ScanNet, Toy, Tree, compared, dense,
                        evaluate, panels_of, toy_training)
from images import draw_grid
from locks import only_writer
from metrics import SEGMENTATION, UNKNOWN, Rules, metrics_of, print_table, results
from mix import tell_untrained
from modalities import MODALITIES, PLAIN_FACTS, PLAIN_SHOWN, VOID, shown_of, write_facts
from trees import facts_of, read_palette, sample_meta
from vae import encoder_of
from weights import load_model, newest_checkpoint

SPACES = ("disparity", "depth")              # of files
ALIGNMENTS = ("disparity", "log", "depth")


# ------------------------------------------------------------------------------------------------
# Output.

def cases(metric, count=2):
    """Indices of the best, median and worst images by the metric's headline."""
    values = {i: row[metric.headline] for i, row in metric.rows.items()}
    order = sorted((i for i in values if np.isfinite(values[i])), key=values.get, reverse=metric.rising)
    middle = max(0, len(order) // 2 - count // 2)
    return list(dict.fromkeys(order[:count] + order[middle:middle + count] + order[-count:]))


def save_array(path, array):
    """A picture as .png, numbers as .npy, floats of 32 bits."""
    with whole_file(path) as file:
        if path.suffix == ".png":
            Image.fromarray(array).save(file, "png")
        else:
            np.save(file, array.astype(np.float32) if array.dtype.kind == "f" else array)


def save_maps(out, metrics, source, frame, maps):
    """OUT/<modality>/<stem>.png and .npy, OUT/error_<modality>/<stem>.png,
    OUT/spread_<modality>/<stem>.npy.
    """
    stem = source.stem(frame.index)
    for m, (_, shown, error, values) in panels_of(metrics, frame, maps).items():
        spread = f"spread_{m}"
        save_array(out / m / f"{stem}.png", shown)
        save_array(out / f"error_{m}" / f"{stem}.png", error)
        if MODALITIES[m].floats:
            save_array(out / m / f"{stem}.npy", values)
        if spread in maps:
            save_array(out / spread / f"{stem}.npy", maps[spread])


def check_report(out):
    """Raise InputError where files of the report's names are there that no evaluation has written."""
    table = out / "per_image.csv"
    ours = table.is_file() and table.read_bytes()[:5] in (b"name,", b"name\n")
    for name in ("per_image.csv", "grid.png", "frames.txt"):
        check(ours or not (out / name).exists(), f"{out / name}: is there, and of no evaluation; use another "
              "--out")


def save_crop(out, place, frame):
    """A frame's square as a folder tree holds it: OUT/rgb/<place>.png, OUT/<modality>/<place>.npy or .png.

    What is unknown is NaN in depth, in metres; zero in normals; 255 in labels.
    """
    save_array(out / "rgb" / f"{place}.png", frame.rgb)
    for m, truth in frame.truth.items():
        if m == "seg" and truth.ndim == 2:
            truth = truth + (truth >= VOID)  # the label 255 is left free
            truth = np.where(truth == UNKNOWN, VOID, truth)
            truth = truth.astype(np.uint8) if truth.max() <= VOID else truth
        ends = (".png", ".npy") if truth.dtype == np.uint8 else (".npy", ".png")
        save_array(out / m / f"{place}{ends[0]}", truth)
        (out / m / f"{place}{ends[1]}").unlink(missing_ok=True)  # of an earlier time


def claim_crops(out, source, told):
    """Begin a tree of squares, or take up that of the same frames: OUT/crops.json says which, OUT/tree.json
    what is told of the files. Raises InputError where OUT holds anything else.
    """
    path = out / "crops.json"
    files = [str(file) for files in source.files for file in files.values()]
    held = dict(recipe=source.recipe, modalities=source.modalities, files=files,
                places=[source.place(i) for i in range(len(source.names))])
    with reading(path, "it is of no evaluation; use another folder"):
        same = path.is_file() and json.loads(path.read_text()) == json.loads(json.dumps(held))
    check(same or not out.exists() or not any(out.iterdir()), f"--save-crops {out}: holds something else "
          "than the squares of these frames; use another folder")
    write_json(path, held)
    write_facts(out, **told)


def claim_maps(out, source):
    """Note in OUT/maps.json whose maps OUT holds. Raises InputError where there are others already."""
    path, own = out / "maps.json", []
    if path.is_file():
        with reading(path, "it is of no evaluation; use another --out"):
            own = list(map(str, json.loads(path.read_text())["stems"]))
    folders = [f"{before}{m}" for m in source.modalities for before in ("", "error_", "spread_")]
    stems = [source.stem(i) for i in range(len(source.names))]
    there = [out / folder / f"{stem}{end}" for folder in folders if (out / folder).is_dir()
             for stem in set(stems) - set(own) for end in (".png", ".npy")]
    for file in there:
        check(not file.exists(), f"{file}: is there, and not by an evaluation; use another --out")
    with whole_file(path) as file:
        file.write(json.dumps({"stems": sorted({*stems, *own})}).encode())


def write_table(path, names, metrics):
    """The scores of each image, a line each."""
    rows = [{"name": name} for name in names]
    for metric in metrics.values():
        for i, scores in metric.rows.items():
            rows[i] |= scores
    text = io.StringIO()
    keys = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))


def write_grid(path, source, predict, metrics):
    """Pictures of the best, median and worst images by the first modality that has scores."""
    metric = next(metric for metric in metrics.values() if metric.rows)
    picks = cases(metric)
    lines = []
    for i in picks:
        frame = source.frame(i)
        maps, = predict([frame])
        lines.append(compared(metrics, frame, maps))
    if lines:
        save_array(path, np.asarray(draw_grid(lines)))
        names = ", ".join(source.names[i] for i in picks)
        print(f"{path}: best, median and worst by {metric.headline}: {names}")


# ------------------------------------------------------------------------------------------------

def arguments():
    """The command's flags -> Namespace. Raises InputError for those that contradict each other."""
    parser = command_parser(__doc__)
    what, flag = parser.add_mutually_exclusive_group(required=True).add_argument, parser.add_argument
    what("--toy", type=int, metavar="N", help="N held-out toy scenes")
    what("--scannet", type=Path, metavar="DIR", help="<scene>/{color,depth}/ as ScanNet exports them")
    what("--data", type=Path, metavar="DIR", help="folder tree <root>/<modality>/<class>/<name>")
    what("--pred", type=Path, metavar="DIR", help="predictions, with --gt; no model runs")
    flag("--gt", type=Path, metavar="DIR")
    flag("--list", type=Path, metavar="FILE", help="--scannet: the frames, a line each: rgb depth")
    flag("--num", type=int, help="--scannet: frames to draw with --seed; default 5000, with --list all")
    flag("--modality", nargs="+", choices=dense(), help="default: all that are there")
    flag("--alignment", choices=ALIGNMENTS, help="in which scale and shift are fitted; default: what the "
         "checkpoint learned, log or disparity; with --pred disparity")
    flag("--depth-range", type=float, nargs=2, default=(1e-3, 10.0), metavar=("MIN", "MAX"),
         help="depths that are scored")
    flag("--depth-space", choices=SPACES, help="what true depth files hold; default: what their tree.json "
         "says, else disparity of --data, depth of --gt")
    flag("--mean-of", type=Path, metavar="TREE", help="--data: also what the mean of these frames scores, "
         "those of training, and the remaining gap")
    flag("--axes", choices=("ours", "marigold"), default="ours",
         help="of the true normals; marigold: +x right")
    flag("--seg-mode", choices=list(SEGMENTATION), help="default: the checkpoint's; semantic for --pred")
    flag("--palette", type=Path, metavar="FILE",
         help="semantic colours: a JSON list, or the meta.json of sample.py")
    flag("--cityscapes-eps", dest="eps", action="store_const", const=1e-12,
         help="absent classes count as 0, as in CycleGAN's script")
    flag("--ensemble", type=int, default=1, metavar="K", help="median of K samples")
    samplers.add_flags(parser)
    flag("--out", type=Path, default=Path("evaluation"))
    flag("--save-maps", action="store_true", help="also all maps and error maps")
    flag("--save-crops", type=Path, metavar="DIR",
         help="also the frames' squares and their truth, to score other predictions on the same")
    flag("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    check(bool(args.pred) == bool(args.gt), "--pred DIR and --gt DIR go together")
    low, high = args.depth_range
    check(0 <= low < high, f"--depth-range {low} {high}: 0 <= MIN < MAX")
    check_ranges(args, toy=(1, 10 ** 6), ensemble=(1, None), num=(1, None))
    check(not args.toy or args.axes == "ours", "--axes marigold: the toy world's normals are in our axes")
    check(args.data or not args.mean_of, "--mean-of belongs to --data")
    check(args.scannet or not (args.list or args.num), "--list and --num belong to --scannet")
    check_replaced(args.json, b"{", b'"recipe"')
    check_apart([args.json, args.scannet and args.out / "frames.txt"],
                [args.ckpt, args.list, args.palette, args.vae])
    return args


def truth_of(args, meta, alignment):
    """The Source of the flags; meta: the checkpoint's, None without a model."""
    if args.toy:
        return Toy(args.toy)
    if args.scannet:
        return ScanNet(args.scannet, args.list, args.num, args.seed)
    facts = facts_of(args.data or args.gt, args.depth_space)
    if args.data:
        return Tree(args.data, meta, facts)
    if facts.said == PLAIN_FACTS.said:
        made = sample_meta(args.gt)
        facts = facts._replace(depth_space="disparity" if made else "depth",
                               said="by its meta.json" if made else facts.said)
    return Pairs(args.pred, args.gt, args.modality, alignment, facts)


def tell_depth(source, alignment, why, depth_range):
    """Print what the true depth is, and in which space predictions are fitted to it."""
    aligned = f"predictions are aligned in {alignment} ({why})"
    if not isinstance(source, Files):
        print(aligned)
        return
    print(f"true depth files hold {source.facts.depth_space} ({source.facts.said}); {aligned}")
    if source.facts.depth_space == "disparity":
        low, high = depth_range
        print(f"of disparity, of 8 and 16 bits in [0, 1], its inverse from {low:g} to {high:g} is scored")


def main():
    """Predict (or read predictions), score against the truth, write per_image.csv, grid.png and the JSON.

    Rank 0 gathers the others' scores.
    """
    args = arguments()
    sampling = samplers.from_flags(args)
    rank, _, device = setup()
    loaded, shown = None, PLAIN_SHOWN
    if args.pred:
        alignment, why = args.alignment or "disparity", "by default"
        source = truth_of(args, None, alignment)
        if source.palette is None and sample_meta(args.pred):
            source.palette = read_palette(args.pred / "meta.json")
    else:
        loaded = load_model(args.ckpt or newest_checkpoint(), device)
        known = loaded.model.modalities
        check("rgb" in known and len(known) > 1, f"{loaded.path}: predicts nothing of RGB, it has "
              f"{', '.join(known)}")
        samplers.check_model(loaded, sampling)
        tell_untrained(loaded, ("rgb",))
        samplers.make_fast(loaded.model, args.precision, args.compile)
        encoder = encoder_of(loaded.meta, device, args.vae)
        shown = shown_of(loaded.meta, loaded.path)
        alignment, why = args.alignment or shown.depth_target, f"{loaded.path} learned {shown.depth_target}"
        source = truth_of(args, loaded.meta, alignment)
        source.modalities = [m for m in source.modalities if m in known]
    both, total = source.modalities, len(source.names)
    asked = args.modality or both
    check(both and set(asked) <= set(both), f"--modality {' '.join(asked)}: there are "
          f"{', '.join(both) or 'none'} in both truth and prediction")
    source.modalities, source.axes = asked, args.axes  # nothing else is read
    others = toy_training() if args.toy else None
    if args.mean_of:
        others = Tree(args.mean_of, loaded.meta, facts_of(args.mean_of, args.depth_space))
    for each in filter(None, (source, others) if args.palette else ()):
        each.palette = read_palette(args.palette)
    seg_mode = source.seg_mode = args.seg_mode or source.seg_mode
    if others:
        others.seg_mode = seg_mode
    palette = source.palette if seg_mode == "semantic" else None
    read = [path for files in source.files for path in files.values()]
    inner = {path.parent for path in read}.union(others.folders if others else ())
    check_folder(args.out, [*source.folders, *inner])
    if args.save_crops:
        check(not args.pred, "--save-crops with --pred: there are no pictures to crop")
        check_folder(args.save_crops, [*source.folders, *inner, args.out], "--save-crops")
    said = [root / "tree.json" for root in (args.data, args.gt, args.pred, args.mean_of) if root]
    check_apart([args.json], [*read, *said, loaded and loaded.path])
    if rank == 0 and "depth" in asked:
        tell_depth(source, alignment, "by --alignment" if args.alignment else why, args.depth_range)
    rules = Rules(alignment, args.depth_range, seg_mode, palette, args.eps, source.void)
    recipe = dict(**source.recipe, count=total, modalities=asked,
                  alignment=f"{alignment}, least squares per image", depth_range=args.depth_range,
                  axes=args.axes, seg_mode=seg_mode, cityscapes_eps=args.eps, torch=torch.__version__,
                  device=device.type)
    fresh = metrics_of(asked, rules)
    if loaded:
        size = loaded.meta["resolution"]
        drawn = ModelPredictor(loaded.model, size, encoder, sampling, fresh, args.seed, args.ensemble)
        predictors = {"value": drawn, "ceiling": Ceiling(encoder, size, fresh, shown)}
        recipe |= dict(depth_target=shown.depth_target, ensemble=args.ensemble,
                       **sampling.recipe(loaded, encoder, args.seed))
    else:
        predictors = {"value": source.predict}
    if others:
        others.modalities = [m for m in asked if m in others.modalities]
        numbered = metrics_of(asked, rules._replace(palette=others.palette))  # as its own files' labels are
        predictors["mean_map"] = MeanMap(others, Ceiling(encoder, size, numbered, shown), palette)
    with only_writer(args.out):
        if rank == 0:
            check_report(args.out)
            if args.save_maps:
                claim_maps(args.out, source)
            if args.save_crops:
                colours = None if palette is None else palette.tolist()
                told = dict(depth_space="depth", seg_mode=seg_mode, palette=colours, void=VOID)
                claim_crops(args.save_crops, source, told)
        barrier()

        def save(frame, maps):
            if args.save_maps:
                save_maps(args.out, fresh, source, frame, maps)
            if args.save_crops:
                save_crop(args.save_crops, source.place(frame.index), frame)
        scored = evaluate(source, predictors, rules, args.batch_size, save)
        if rank == 0:
            report(args, source, predictors["value"], scored, recipe)


def report(args, source, predict, scored, recipe):
    """Print the scores of {predictor: {modality: Metric}} and write OUT's files and --json.

    Raises InputError where nothing was scored.
    """
    asked, total = source.modalities, len(source.names)
    found = {name: results(metrics) for name, metrics in scored.items()}
    metrics, result = scored["value"], found.pop("value")
    check(result, f"none of the {total} frames has a valid truth in {', '.join(asked)} (depth between "
          f"{args.depth_range[0]} and {args.depth_range[1]}, colours near the palette's; unknown pixels are "
          "not scored)")
    result |= found
    if "mean_map" in found:
        ceiling, guessed = found["ceiling"], found["mean_map"]
        headlines = [metric.headline for metric in metrics.values()]
        result["gap"] = {key: (result[key] - ceiling[key]) / (guessed[key] - ceiling[key])
                         for key in headlines if key in guessed and guessed[key] != ceiling[key]}
    valid = metrics["depth"].rows if "depth" in asked else range(total)
    unknown = [name for i, name in enumerate(source.names) if i not in valid]
    result |= dict(no_valid_depth=unknown, recipe=recipe)
    print_table(metrics, result)
    for m, metric in metrics.items():
        if metric.pooled.get("unknown"):
            share = metric.pooled["unknown"] / metric.pooled["pixels"]
            print(f"{m}: {share:.1%} of the true pixels are void or of no class, and not scored")
    if unknown:
        print(f"{len(unknown)} of {total} frames have no valid depth and are left out of the depth figures: "
              f"{', '.join(unknown[:10])}{' ...' if len(unknown) > 10 else ''}")
    write_table(args.out / "per_image.csv", source.names, metrics)
    write_grid(args.out / "grid.png", source, predict, metrics)
    if args.scannet:
        with whole_file(args.out / "frames.txt") as file:
            file.write(source.list)
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    run(main)
