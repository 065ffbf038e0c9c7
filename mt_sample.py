"""MT-Diffusion's tasks (Sec. 4): images and X from noise, one from the other.

    python mt_sample.py --task translate --image photo.jpg --ckpt runs/mt            # of --pair SOURCE TARGET
    python mt_sample.py --task restore --image photo.png --mask hole.png --ckpt RUN  # of --pair masked
    python mt_sample.py --task classify --image DIR --ckpt RUN                       # of --pair label
    python mt_sample.py --task generate --num 8 --ckpt RUN                           # of any: image, and X
    python mt_sample.py --task evaluate --data DIR --ckpt RUN                        # translations, scored

Writes OUT/<modality>/<stem>.png, OUT/masked_rgb/, OUT/classes/<stem>.json (name, class, probability of the
best five), OUT/feature/<stem>.npy, OUT/grid.png and OUT/meta.json, as sample.py does: shared out, seeded
per sample, continued.
"""
import collections
import functools
import json
import pathlib
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import mt_model
import sample
import samplers
from dataset import to_unit
from distributed import (check, check_apart, check_folder, check_ranges, check_read, check_replaced,
                         command_parser, run, setup, sha256, whole_file, with_row, write_json)
from evaluation import Ceiling, Toy, Tree, evaluate, stems
from images import as_it_is, enlarge, fill_unknown
from locks import only_writer
from metrics import Rules, metrics_of, print_table, results
from modalities import MODALITIES, check_turned, read_array, read_mask, shown_of
from mt_model import Chain, TranslationPredictor, draw_images
from produce import SHOWN, finish, folders_read, produce, read_meta, write_grid, write_npz
from trees import facts_of, flat_name, picture_folder, recorded, stem_of
from vae import encoder_of
from weights import load_model, newest_checkpoint

PRESETS = {"paper": f"--steps {mt_model.T}"}  # what --preset stands for: every step of the chain
NEEDS = {"translate": "pair", "restore": "masked", "classify": "label", "evaluate": "pair"}  # task: setting
PICTURES = "generate", "translate", "restore"  # what draws some
READERS = {  # of flags that not every task reads
    **dict.fromkeys(("class_id", "classes", "features"), ("generate",)),
    **dict.fromkeys(("outputs", "npz", "truncate"), PICTURES),
    **dict.fromkeys(("num", "out", "overwrite"), (*PICTURES, "classify")),
    **dict.fromkeys(("cfg", "start", "x_update"), (*PICTURES, "evaluate")),
    "classifier_scale": ("generate",),
    "fit": ("translate", "restore", "classify"),
    "depth_space": ("translate", "evaluate"),
}


# ------------------------------------------------------------------------------------------------
# Images: from noise, or from their source.

class Images(sample.Drawing):
    """Draws the modalities of a pair from noise or from the source, or images alone; sampling is a Chain."""

    def sample(self, batch, inputs, noise):
        source = self.encoded(inputs, self.given[0], noise) if self.given else None
        x = draw_images(self.model, self.labels(batch), noise, self.sampling, source)
        images = self.decoded(x, self.wanted) if self.wanted else [()] * len(batch)
        for request, one, pixels in zip(batch, inputs, images):
            yield request, {**dict(zip(self.wanted, pixels)), **one.whole}, one.shape

    def images(self, latents):
        """Pixels (N, 3, fH, fW) of latents (N, C, H, W)."""
        return self.encoder.decode(latents, self.sampling.precision).cpu().numpy()


# ------------------------------------------------------------------------------------------------
# Restoration.

class Hidden(NamedTuple):
    """A photo, read once, and what of it is to be restored."""
    pixels: dict          # {"rgb": (3, fH, fW)} at the network's size
    whole: np.ndarray     # (3, H, W) as it is to be written
    mask: np.ndarray      # (fH, fW) bool: hidden
    whole_mask: np.ndarray  # (H, W) bool


def read_hidden(request, fit, full, patches, seed):
    """A photo and its mask, or so many random squares. InputError for a mask that does not fit."""
    row, path = MODALITIES["rgb"], request.files["rgb"]
    raster = row.open(path)
    if patches:
        pixels = row.pixels(raster, fit)
        whole, size = row.pixels(raster, as_it_is) if full else pixels, pixels.shape[1:]
        random = np.random.default_rng((seed, request.index, patches)).random((patches, 2))
        corners = torch.from_numpy((random * size).astype(int))[None]
        squares = mt_model.visible(corners, torch.tensor([patches]), size, mt_model.PATCH)
        mask = squares[0, 0].numpy() == 0
        large = F.interpolate(squares, whole.shape[1:])[0, 0].numpy() < 1
        return Hidden({"rgb": pixels}, whole, mask, large)
    file = request.files["mask"]
    masked = read_mask(file)
    check_turned([raster, masked])
    image = Image.fromarray(masked.values.astype(np.float32))
    check(image.size == raster.size, f"{file}: {image.width}x{image.height}, {path} is {raster.size[0]}x"
          f"{raster.size[1]}; they must be of one size")
    hidden = np.asarray(image) > 1e-3
    mask = np.asarray(fit(image)) > 1e-3  # a pixel that shrinks away would count as known
    check(mask.any(), f"{file}: hides nothing; what is to be restored must be white (255)")
    # Filled before it is resized: what is hidden would reach the pixels around the mask.
    pixels = row.pixels(raster._replace(values=fill_unknown(raster.values, ~hidden)), fit)
    if full:
        return Hidden({"rgb": pixels}, row.pixels(raster, as_it_is), mask, hidden)
    return Hidden({"rgb": pixels}, pixels, mask, mask)


class Restoration(Images):
    """Fills what a mask hides; the pixels outside of it are written as they are (Sec. 4.1), but for SDEdit,
    which keeps none of them, or where the whole is asked for (Table 1).

    What lies under the mask is first filled from the nearest pixel, so that it does not leak through the
    autoencoder into the latents around it; then the latents under it are zero, as in training. sdedit: the
    baseline, from the masked image noised over this share of the steps.
    """

    sdedit, write_all = None, False

    def sample(self, batch, inputs, noise):
        """Yield each request with its restored and its masked picture, (3, H, W)."""
        pixels = torch.from_numpy(np.stack([one.pixels["rgb"] for one in inputs]))            # (N, 3, fH, fW)
        hidden = np.stack([one.mask for one in inputs])                                       # (N, fH, fW)
        filled = pixels.clone()
        for k, mask in enumerate(hidden):
            filled[k] = torch.from_numpy(fill_unknown(pixels[k].movedim(0, 2).numpy(), ~mask)).movedim(2, 0)
        hidden = torch.from_numpy(hidden)[:, None]                                            # (N, 1, fH, fW)
        cells = F.max_pool2d(hidden.float(), self.encoder.factor).to(self.device)             # (N, 1, H, W)
        z = self.encoder.encode(filled.to(self.device), noise)                                # (N, C, H, W)
        x, begin = z * (1 - cells), None
        if self.sdedit:
            masked = torch.where(hidden, 0.0, pixels).to(self.device)
            begin, x = (self.encoder.encode(masked, noise), self.sdedit), torch.zeros_like(x)
        known = torch.ones(len(batch), dtype=torch.bool, device=self.device)
        z, _ = self.model.sample(noise, known, x, self.sampling, begin, x.shape[2:])
        for request, one, image in zip(batch, inputs, self.images(z)):
            if image.shape != one.whole.shape:
                image = enlarge(image, one.whole.shape[1:])
            drawn = one.whole_mask | self.write_all
            maps = {"rgb": np.where(drawn, image, one.whole),
                    "masked_rgb": np.where(one.whole_mask, np.float32(0), one.whole)}
            yield request, maps, None


# ------------------------------------------------------------------------------------------------
# Labels and vectors.

class WithLabels(Images):
    """Images with their labels, both drawn where the label is not known (Sec. 4.2)."""

    def sample(self, batch, inputs, noise):
        labels, classes = self.labels(batch), self.model.num_classes
        z, x = self.model.sample(noise, labels < classes, labels, self.sampling)
        for request, image, chance in zip(batch, self.images(z), F.one_hot(x.cpu(), classes).float()):
            yield request, {"rgb": image, "classes": chance}, None


class Classes(Images):
    """The labels of images."""

    def sample(self, batch, inputs, noise):
        z = self.encoded(inputs, "rgb", noise)
        chances = self.model.recognise(z, noise, precision=self.sampling.precision).softmax(1).cpu()
        for request, chance in zip(batch, chances):
            yield request, {"classes": chance}, None


class WithVectors(Images):
    """Images with their feature vectors; vectors (K, F) in turn, where they are known."""

    vectors = None

    def sample(self, batch, inputs, noise):
        x, known = None, torch.zeros(len(batch), dtype=torch.bool, device=self.device)
        if self.vectors is not None:
            rows = [request.index % len(self.vectors) for request in batch]
            x, known = torch.from_numpy(self.vectors[rows]).to(self.device), ~known
        z, x = self.model.sample(noise, known, x, self.sampling)
        for request, image, vector in zip(batch, self.images(z), x.cpu().numpy()):
            yield request, {"rgb": image, "feature": vector}, None


def read_features(path, size):
    """Vectors (K, F) of a .npy file, at the scale of the cache's. Raises InputError for anything else."""
    vectors = read_array(path)
    right = vectors.dtype.kind == "f" and vectors.ndim == 2 and vectors.shape[1] == size
    check(right and np.isfinite(vectors).all(),
          f"--features {path}: needs finite floats of shape (K, {size})")
    return to_unit(vectors.astype(np.float32)).astype(np.float32)


class Outputs(sample.Maps):
    """Pictures, and beside them the best five classes or the vector of each."""

    def __init__(self, folders, truncate, beside, class_names):
        super().__init__(folders, truncate)
        self.beside, self.class_names = beside, class_names
        if beside:
            self.endings[beside] = [".npy" if beside == "feature" else ".json"]

    def write(self, out, request, maps, shape):
        if self.beside:
            with whole_file(out / self.beside / f"{request.stem}{self.endings[self.beside][0]}") as file:
                if self.beside == "feature":
                    np.save(file, maps["feature"])
                else:
                    file.write(json.dumps(self.best(maps["classes"])).encode())
        return super().write(out, request, maps, shape)

    def best(self, chance):
        """Probabilities (K,) -> [[name, class, probability]] of the best five."""
        chance, at = chance.topk(min(5, len(chance)))
        names = self.class_names or [str(i) for i in range(int(at.max()) + 1)]
        return [[names[i], i, p] for i, p in zip(at.tolist(), chance.tolist()) if p > 0]


def report_classes(out, requests, num_classes):
    """Print the classes of the first requests -> {top1, top5} of all pictures of OUT whose class is known."""
    samples = {entry["stem"]: entry for entry in read_meta(out)["samples"]}
    files = {stem: out / "classes" / f"{stem}.json" for stem in samples}
    best = {stem: json.loads(file.read_text()) for stem, file in files.items() if file.is_file()}
    for request in requests[:SHOWN]:
        print(f"{request.stem}: " + ", ".join(f"{name} {p:.3f}" for name, _, p in best[request.stem]))
    found = [(samples[stem]["class_id"], [i for _, i, _ in five]) for stem, five in best.items()
             if samples[stem]["given"] and samples[stem]["class_id"] < num_classes]
    if not found:
        return {}
    scores = dict(top1=np.mean([label == five[0] for label, five in found]),
                  top5=np.mean([label in five for label, five in found]), labelled=len(found))
    print(f"top-1 {100 * scores['top1']:.2f} %, top-5 {100 * scores['top5']:.2f} % of {len(found)} pictures")
    return scores


# ------------------------------------------------------------------------------------------------
# Translations against the truth.

def score(args, loaded, encoder, chain, rank):
    """Print, and write to --json, the scores of translations of RGB and of the autoencoder alone."""
    model, meta = loaded.model, loaded.meta
    target, origin = model.modalities
    check(origin == "rgb", f"{loaded.path}: translates {origin}, only translations of rgb are scored")
    source = Toy(args.toy) if args.toy else Tree(args.data, meta, facts_of(args.data, args.depth_space))
    check(target in source.modalities, f"--task evaluate: there is no truth of {target}")
    source.modalities = [target]
    shown = shown_of(meta, loaded.path)
    rules = Rules(shown.depth_target, seg_mode=source.seg_mode, palette=source.palette, void=source.void)
    metrics, size = metrics_of([target], rules), meta["resolution"]
    predictors = {"value": TranslationPredictor(model, size, encoder, chain, metrics, args.seed),
                  "ceiling": Ceiling(encoder, size, metrics, shown)}
    scored = evaluate(source, predictors, rules, args.batch_size)
    if rank > 0:
        return
    found = results(scored["value"])
    check(found, f"none of the {len(source.names)} frames has a known pixel of {target}")
    result = {**found, "ceiling": results(scored["ceiling"])}
    print_table(scored["value"], result)
    if args.json:
        recipe = dict(**source.recipe, count=len(source.names), seg_mode=source.seg_mode,
                      torch=torch.__version__, device=model.backbone.pos_embed.device.type,
                      **samplers.recipe(loaded, encoder, args.seed, chain.steps, **chain._asdict()))
        write_json(args.json, {**result, "recipe": recipe})


# ------------------------------------------------------------------------------------------------

def arguments():
    """The command's flags -> Namespace. InputError for those that contradict each other."""
    parser = command_parser(__doc__)
    parser.add_argument("--task", required=True, choices=("generate", *NEEDS))
    parser.add_argument("--preset", choices=list(PRESETS), help="the paper's flags, before your own")
    parser.add_argument("--toy", type=int, metavar="N", help="evaluate: N held-out toy scenes")
    parser.add_argument("--data", type=pathlib.Path, help="evaluate: folder tree <root>/<modality>/...")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="evaluate: the scores")
    samplers.checkpoint_flags(parser)
    sample.add_flags(parser)
    parser.add_argument("--start", choices=("shifted", "standard"), default="shifted",
                        help="around the share of a known X, or N(0, 1) as the paper writes")
    parser.add_argument("--x-update", choices=("mean", "sample", "argmax"),
                        help="how an unknown X follows its head; default: mean, of labels sample")
    parser.add_argument("--classifier-scale", type=float, default=0.0,
                        help="label: guidance by the gradient of the model's own head")
    parser.add_argument("--mask", type=pathlib.Path,
                        help="restore: a picture of the photo's size, white is hidden; or a folder of such")
    parser.add_argument("--patches", type=int,
                        help=f"restore: hide so many random squares of {mt_model.PATCH} pixels instead")
    parser.add_argument("--sdedit", type=float, metavar="SHARE",
                        help="restore: the baseline, from the masked image noised so far (0 to 1)")
    parser.add_argument("--whole-image", action="store_true",
                        help="restore: write all that was drawn, not only what was hidden")
    parser.add_argument("--features", type=pathlib.Path,
                        help="generate, feature checkpoints: .npy (K, F), one vector a sample")
    args = parser.parse_args(with_row(sys.argv[1:], "--preset", PRESETS))
    check_read(parser, args, READERS)
    check_replaced(args.json, b"{", b'"recipe"')
    check_apart([args.json], [args.ckpt, args.features, args.data and args.data / "tree.json"])
    samplers.check_flags(args)
    sample.check_flags(args)
    restoring = args.task == "restore"
    hiding = (args.mask is not None) + (args.patches is not None)
    check(hiding == restoring and (restoring or not (args.sdedit or args.whole_image)),
          "--task restore, and it alone, takes one of --mask and --patches, and --sdedit and --whole-image")
    check(not args.sdedit or args.start == "shifted", f"--start {args.start} with --sdedit, which "
          "starts from the masked image")
    check(not (args.toy and args.depth_space), "--depth-space with --toy: the toy world tells it")
    check_ranges(args, patches=(1, 1000), toy=(1, 10 ** 6))
    check(args.sdedit is None or 0 < args.sdedit <= 1, f"--sdedit {args.sdedit}: a share above 0, up to 1")
    check(np.isfinite(args.classifier_scale), f"--classifier-scale {args.classifier_scale}: must be finite")
    check(bool(args.image) == (args.task not in ("generate", "evaluate")), f"--task {args.task}: "
          f"{'takes no --image' if args.image else 'needs --image'}")
    scored = args.task == "evaluate"
    check(bool(args.toy) + bool(args.data) == scored and (scored or not args.json),
          "--task evaluate, and it alone, takes one of --toy and --data, and --json")
    return args


def chain_of(args, pair):
    """The Chain of the flags. Raises InputError for what the checkpoint's setting does not know."""
    allowed = ("sample", "argmax") if pair == "label" else ("mean",)
    check(args.x_update in (None, *allowed), f"--x-update {args.x_update}: with --pair {pair} an unknown X "
          f"follows by {' or '.join(allowed)}")
    check(not args.classifier_scale or pair == "label", f"--classifier-scale {args.classifier_scale}: needs "
          f"a checkpoint of --pair label, this one is of {pair}")
    check(args.steps <= mt_model.T, f"--steps {args.steps}: the chain has {mt_model.T}")
    return Chain(steps=args.steps, start=args.start, x_update=args.x_update, cfg=args.cfg,
                 classifier_scale=args.classifier_scale, precision=args.precision)


def check_task(args, loaded):
    """Raise InputError where the checkpoint's setting does not have the task, and where its classes are asked
    of a head that was not trained.
    """
    pair, needs = loaded.model.pair, NEEDS.get(args.task)
    own = ["generate", *(task for task, setting in NEEDS.items() if setting == pair)]
    check(needs in (None, pair), f"--task {args.task}: needs a checkpoint of --pair {needs}, "
          f"this one is of {pair}; its tasks: {', '.join(own)}")
    check(not args.features or pair == "feature", "--features is for a checkpoint of --pair feature")
    classes = args.class_id or (None if args.classes == "random" else args.classes)
    check(not classes or pair == "label", f"--class-id, --classes {classes}: this checkpoint ({pair}) "
          "knows nothing of classes")
    check(args.task != "classify" or learns_x(loaded.train), f"--task classify: {loaded.path} was trained "
          f"with --x-weight {loaded.train.get('x_weight')} --single {loaded.train.get('single')}; its head "
          "has learned nothing")


def learns_x(train):
    """Whether a run of these flags trains the head of X."""
    return train.get("x_weight", 0.1) > 0 and train.get("single", 0) < 1


def told(args, model, requests):
    """Whether X, or all of the mask, is known of what is drawn."""
    labelled = any(request.label < model.num_classes for request in requests)
    return args.task != "generate" or bool(args.features) or model.pair == "masked" or labelled


def tell_unlearned(args, loaded, known):
    """Print what of the task the run was not trained for, and which flags do nothing; known: as of told."""
    pair, train = loaded.model.pair, loaded.train
    seen = train.get("single", 0) if pair in ("label", "feature") else 1 - train.get("hidden", 0)
    masks = train.get("full_mask", 0)
    guided = args.cfg != 1.0 or bool(args.classifier_scale)
    carried = pair != "masked-u" or train.get("agg") != "none"  # an X that is drawn reaches the image
    lacks = {
        "its head of the noise has learned nothing (--eps-weight 0)": train.get("eps_weight", 1) == 0,
        "it was never shown X (--hidden 1, or --single 0)": known and seen == 0,
        "it never drew an image without X (--hidden 0, or --single 1)": not known and seen == 1,
        "it never saw an image without X, which guidance leads away from": known and guided and seen == 1,
        "its head of X has learned nothing": not learns_x(train) and (args.classifier_scale != 0
                                                                      or (not known and carried)),
        "it was shown masks over everything alone": args.task == "restore" and masks == 1,
        "it was shown no mask over everything": args.task == "generate" and pair == "masked" and masks == 0,
    }
    for why in (why for why, lacking in lacks.items() if lacking):
        print(f"warning: {loaded.path} was not trained for this: {why}")
    if not known and guided:
        print("warning: --cfg and --classifier-scale have no effect where nothing is known of X")


def with_masks(requests, mask, location):
    """Requests of photos with the mask of each: one file, or of a folder that of the photo's name."""
    if not mask.is_dir():
        return [request._replace(files={**request.files, "mask": mask}) for request in requests]
    folder, out = stems(picture_folder(mask, "mask")), []
    photos = {request.files["rgb"] for request in requests}
    twins = collections.Counter(stem_of(photo, photo.parent) for photo in photos)
    for request in requests:
        photo = request.files["rgb"]
        alone = stem_of(photo, photo.parent)
        place = flat_name(stem_of(photo, location)) if location.is_dir() else alone
        names = (place, alone) if twins[alone] == 1 else (place,)  # of two photos it would be either's
        found = [folder[name] for name in names if name in folder]
        check(found, f"{photo}: no mask {place} or {alone} in {mask}")
        out.append(request._replace(files={**request.files, "mask": found[0]}))
    return out


def requests_of(args, model, meta, shown):
    """What is to be drawn, and {given modality: Facts of its files}."""
    classes = meta["num_classes"]
    if args.task == "generate":
        num = args.num or (len(read_features(args.features, model.features)) if args.features else None)
        sample.check_classes(args.class_id, classes)
        requests = sample.of_classes(args.class_id, args.classes, num, classes, args.seed)
        if not args.class_id and (model.pair != "label" or args.classes == "random"):
            requests = [request._replace(label=classes) for request in requests]  # drawn, or none
        return requests, {}
    given = model.modalities[1] if args.task == "translate" else "rgb"  # 1: the source
    locations = sample.locations_of(args.image, [given], args.task)
    walked = [*locations, *([picture_folder(args.mask, "mask")] if args.mask else [])]
    requests = sample.of_pictures([given], locations, None, args.num or 1, meta)
    if args.mask:
        requests = with_masks(requests, args.mask, locations[0])
    check_folder(args.out, folders_read(walked, requests))
    return requests, sample.facts_for([given], locations, args.depth_space, meta, shown)


def drawing(args, model, encoder, chain, wanted, fit, facts, shown):
    """What draws the task's requests."""
    full = args.fit == "full"
    kind = {"restore": Restoration, "classify": Classes}.get(args.task)
    kind = kind or {"label": WithLabels, "feature": WithVectors}.get(model.pair, Images)
    given = model.modalities[1:] if args.task == "translate" else ()
    read = functools.partial(sample.read_input, fit=fit, full=full, facts=facts, shown=shown)
    if args.task == "restore":
        read = functools.partial(read_hidden, fit=fit, full=full, patches=args.patches, seed=args.seed)
    draw = kind(model, encoder, chain, args.seed, wanted, read, given)
    if args.task == "restore":
        draw.sdedit, draw.write_all = args.sdedit, args.whole_image or bool(args.sdedit)
    if args.features:
        draw.vectors = read_features(args.features, model.features)
    return draw


def main():
    """Draw what the flags ask for, shared out over the processes; what is there already is kept."""
    args = arguments()
    rank, _, device = setup()
    loaded = load_model(args.ckpt or newest_checkpoint(mt_model.METHOD), device,
                        method=mt_model.METHOD, build=mt_model.build)
    model, meta = loaded.model, loaded.meta
    check_task(args, loaded)
    chain = chain_of(args, model.pair)
    if args.task == "evaluate" and rank == 0:
        tell_unlearned(args, loaded, known=True)
    samplers.make_fast(model.backbone, args.precision, args.compile)
    encoder = encoder_of(meta, device, args.vae)
    if args.task == "evaluate":
        return score(args, loaded, encoder, chain, rank)
    shown = shown_of(meta, loaded.path)
    requests, facts = requests_of(args, model, meta, shown)
    wanted = sample.outputs_of(args.outputs, model.modalities, {"--npz": ("rgb",) if args.npz else ()})
    folders = {} if args.task == "classify" else {m: MODALITIES[m] for m in wanted}
    if args.task == "restore":
        folders["masked_rgb"] = MODALITIES["rgb"]
    beside = {"label": "classes", "feature": "feature"}.get(model.pair)
    outputs = Outputs(folders, args.truncate, beside, meta["class_names"])
    fit = sample.fit_of(args.fit, meta["resolution"], model.patch_size * encoder.factor)
    draw = drawing(args, model, encoder, chain, wanted, fit, facts, shown)
    if rank == 0:
        print(f"{loaded.path}: MT-Diffusion, {model.pair}: {', '.join(model.modalities)}, "
              f"step {loaded.step}; {len(requests)} samples on {device}")
        sample.tell_depth(facts, shown, folders)
        tell_unlearned(args, loaded, told(args, model, requests))
    evaluations, walk = max(1, round((args.sdedit or 1) * chain.steps)), chain._asdict()
    if args.task == "classify":
        evaluations, walk = 1, dict(precision=chain.precision)
    recipe = None if rank > 0 else dict(
        task=args.task, **samplers.recipe(loaded, encoder, args.seed, evaluations, **walk),
        **extras_of(args), fit=args.fit, truncate=args.truncate, outputs=list(outputs.folders),
        endings=outputs.endings, depth_target=shown.depth_target, reading=recorded(facts),
        palette=meta["palette"])
    one_by_one = args.fit == "full"  # pictures of different shapes do not stack
    with only_writer(args.out):
        drawn = produce(args.out, requests, draw, outputs, recipe, 1 if one_by_one else args.batch_size,
                        meta["class_names"], args.overwrite)
        if rank == 0:
            scores = {}
            if beside == "classes":
                scores = {"scores": report_classes(args.out, requests, meta["num_classes"])}
            if folders:
                names = dict.fromkeys(("masked_rgb", *draw.given, *folders))  # the given first
                labels = {name: name.replace("_", " ") + " (given)" * (name in draw.given)
                          for name in names if name in folders}
                truth = None
                if args.task == "translate":
                    truth = functools.partial(sample.truth_pictures, modalities=model.modalities, fit=fit,
                                              facts=facts, target=shown.depth_target)
                write_grid(args.out, requests, drawn, labels, truth)
            if args.npz or (args.out / "samples.npz").exists():
                write_npz(args.out)
            finish(args.out, **scores)
            print(args.out / ("grid.png" if folders else "classes"))


def extras_of(args):
    """The task's own flags, for the recipe."""
    given = {name: getattr(args, name) for name in ("patches", "sdedit", "features")}
    extras = {name: str(value) for name, value in given.items() if value is not None}
    extras |= {"whole_image": True} if args.whole_image else {}
    return {**extras, "features_sha256": sha256(args.features)} if args.features else extras


if __name__ == "__main__":
    run(main)
