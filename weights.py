"""Checkpoint files: read and exported; MMGen's released ones, REPA's and SiT's.

    python weights.py --ckpt runs/mmgen --export demo/mmgen.pt           # EMA in bf16 without projector
    python weights.py --ckpt runs/mmgen --export mmgen.safetensors       # the same
    python weights.py --ckpt runs/mmgen --export-official 0600000.pt     # as MMGen's own code loads it

All have SiT's blocks and DiT's names. MMGen's and REPA's time runs from data to noise, so that their
velocity is the negative of ours: the last layer of each head is negated; what they embed is the noise
level, as here. SiT's own velocity has our sign, and it embeds our t: its first time layer is turned to read
the noise level; of its learned-sigma heads the first half is the velocity. REPA's and SiT's networks have
the RGB alone, and a time MLP that is not fused.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import pathlib
import pickle
import re

import torch
from safetensors import safe_open
from safetensors.torch import save

from distributed import (InputError, bare, check, check_apart, command_parser, reading, run, sha256,
                         utf8_path, whole_file)
from model import SIZES, build_model

FORMAT = "mmgen-1"
DEMO = pathlib.Path(__file__).parent / "demo"
META = ("vae", "vae_sha256", "scale", "latent_channels", "latent_size", "resolution", "class_names",
        "palette")
RELEASED = ("rgb", "depth", "normal", "seg")  # the modalities of the released weights, in their order
RELEASED_SHOWN = {"depth_over": "picture", "uncovered": "colour"}
SD_SCALE = 0.18215
RENAMED = (  # theirs, ours
    ("y_embedder.embedding_table.", "y_embedder."),
    ("taskcond_embedder.embedding_table.", "task_embedder."),
    ("lis_final_layer.", "heads."),
    ("final_layer.", "heads.0."),
    ("projectors.0.", "projector."),
)
OUTPUT = re.compile(r"heads\.\d+\.linear\.(weight|bias)")
POINTER = 1000  # bytes: a smaller latest.pt is no checkpoint, it names one


# ------------------------------------------------------------------------------------------------
# Reading.

def locate(path):
    """A checkpoint's file: of hf:owner/repository/file a local copy from the hub, of a run folder its
    latest.pt -> Path.

    Raises InputError when it cannot be had.
    """
    if not str(path).startswith("hf:"):
        path = pathlib.Path(path)
        path = path / "latest.pt" if path.is_dir() else path
        return target_of(path) if path.name == "latest.pt" else path  # the run may go on meanwhile
    owner, _, rest = str(path)[3:].partition("/")
    name, _, file = rest.partition("/")
    check(owner and name and file, f"{path}: the form is hf:OWNER/REPOSITORY/FILE")
    from huggingface_hub import hf_hub_download
    with reading(path, f"download {file} from {owner}/{name} and give its path"):
        return pathlib.Path(hf_hub_download(f"{owner}/{name}", file))


def target_of(latest):
    """The checkpoint that a run's latest.pt stands for -> Path; a lost one is not there.

    latest.pt is a link or, on a file system without links, a text that names the file within its folder.
    Raises InputError where the text names no such file.
    """
    file = latest.resolve()
    if file.name != "latest.pt" or not file.is_file() or file.stat().st_size > POINTER:
        return file
    name = os.fsdecode(file.read_bytes()).strip()
    parts = pathlib.PurePath(name).parts
    inside = parts and name.isprintable() and ".." not in parts and not pathlib.PurePath(name).anchor
    check(inside, f"{latest}: names {name[:60]!r}, expected a file of its folder as ckpt/0000004.pt; "
          "write that, or link it to one")
    return file.parent / name


def newest_checkpoint(method="mmgen"):
    """The newest runs/*/latest.pt of a method, else of MMGen the bundled demo. Raises InputError where there
    is neither.
    """
    times = {}
    for path in pathlib.Path("runs").glob("*/latest.pt"):
        with contextlib.suppress(InputError, FileNotFoundError):  # a lost one is passed over
            times[path] = target_of(path).stat().st_mtime
    for path in sorted(times, key=times.get, reverse=True):
        try:
            train = load_checkpoint(path)["config"]["train"]
        except InputError:
            return path  # what is wrong with it is said when it is opened
        if train.get("method", "mmgen") == method:
            return path
    check(method == "mmgen", f"runs/*/latest.pt: none is of {method}; train one, or pass --ckpt")
    return DEMO / "mmgen.pt"


def load_checkpoint(path):
    """A checkpoint, memory-mapped: {model, ema, opt, step, config, ages, format}; released weights as
    translate gives them.

    path: a file of this project, of MMGen, REPA or SiT, a run folder, or hf:owner/repository/file.
    Raises InputError when the file is missing, cut short, holds pickled objects, or is something else.
    """
    path = locate(path)
    check(path.is_file(), f"{path}: no such checkpoint; give a file, a run's folder, or "
          "hf:OWNER/REPOSITORY/FILE")
    with reading(path, "it may be cut short; use another of its folder"):
        try:
            checkpoint = _load(path)
        except pickle.UnpicklingError as error:  # what weights_only=True raises
            raise InputError(f"{path}: refused, it holds pickled Python objects or is no torch file; "
                             "only tensors and plain containers are read") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        return translate(checkpoint, path)
    lost = _lost(checkpoint)
    check(not lost, f"{path}: incomplete ({lost} is missing or wrong); use another of its folder")
    states = {part: bare(checkpoint[part]) for part in ("ema", "model") if part in checkpoint}
    return {**checkpoint, **states}


def _load(path):
    """What torch.save wrote, mapped into memory unless it is of torch's older format; of safetensors, which
    begin with the length of their header, a JSON object, {ema} and what the header says of it.
    """
    with open(path, "rb") as file:
        head = file.read(24)
    if head[8:9] == b"{":
        return _load_safetensors(path)
    check(not head.startswith(b"version https://git-lfs"), f"{path}: is the stub of a Git LFS file; fetch "
          "the file itself with `git lfs pull`")
    zipped = head.startswith(b"PK\x03\x04")
    with (torch.serialization.safe_globals([argparse.Namespace]),  # of the released files' arguments
          utf8_path(path) as name):
        return torch.load(name, map_location="cpu", weights_only=True, mmap=zipped)


def _load_safetensors(path):
    with utf8_path(path) as name, safe_open(name, "pt") as file:
        told = json.loads((file.metadata() or {}).get("checkpoint", "{}"))
        check(isinstance(told, dict), f"{path}: the checkpoint in its metadata is no JSON object; export it "
              "again")
        return {**told, "ema": {key: file.get_tensor(key) for key in file.keys()}}


def _is_state(state):
    return isinstance(state, dict) and all(isinstance(key, str) and isinstance(value, torch.Tensor)
                                           for key, value in state.items())


def _lost(checkpoint):
    """What a checkpoint of this project lacks, or None."""
    config = checkpoint.get("config")
    for part in ("model", "meta", "train"):
        if not isinstance(config, dict) or not isinstance(config.get(part), dict):
            return f"config {part}"
    for key in META:
        if key not in config["meta"]:
            return f"config {key}"
    for part in ("ema", "model"):
        if not _is_state(checkpoint.get(part, {})):
            return part
    if not checkpoint.get("ema"):
        return "ema"
    return None if isinstance(checkpoint.get("step"), int) else "step"


def blocks_of(path):
    """Which of layers.BLOCKS a checkpoint has; of None the released ones. Raises InputError as
    load_checkpoint does.
    """
    return load_checkpoint(path)["config"]["model"].get("blocks", "sit") if path else "sit"


class Loaded:
    """A model for sampling, and of its checkpoint: meta, the cache's meta.json; step; train, the flags."""

    def __init__(self, model, checkpoint, path):
        self.model, self.path, self.step = model, path, checkpoint["step"]
        self.meta, self.train = checkpoint["config"]["meta"], checkpoint["config"]["train"]

    @functools.cached_property
    def sha256(self):
        return sha256(self.path)


def load_model(path, device="cpu", weights="ema", method="mmgen", build=build_model):
    """The model of a checkpoint for sampling -> Loaded; in fp32 and eval mode, without the projector.

    fp32 weights stay in the mapped file until they are used or moved to a device: nothing else of it is read.
    Raises InputError as load_checkpoint does, and for a checkpoint of another method.
    """
    path = locate(path)
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    found = config["train"].get("method", "mmgen")
    command = {"mmgen": "sample.py", "mt-diffusion": "mt_sample.py"}.get(found, "a newer version")
    check(found == method, f"{path}: is a checkpoint of {found}; use {command}")
    check(weights in checkpoint, f"{path}: has no {weights} weights, it was exported with the EMA alone")
    try:
        with torch.device("meta"):  # no memory, no initialisation
            model = build(**{**config["model"], "projector": False})
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        said = f"its model configuration {config['model']} is not of this version ({error})"
        raise InputError(f"{path}: {said}") from error
    state = {key: value.float() for key, value in without_projector(checkpoint[weights]).items()}
    load_weights(model, state, path, assign=True)
    return Loaded(model.to(device).eval().requires_grad_(False), checkpoint, path)


def without_projector(state):
    """A state dict without the part that training alone needs."""
    return {key: value for key, value in state.items() if not key.startswith("projector.")}


def load_weights(model, state, path, assign=False):
    """load_state_dict with every mismatch in one readable error; the projector may be there or not."""
    mine = model.state_dict()
    for key in sorted(mine.keys() | state.keys()):
        ours, theirs = (tuple(part[key].shape) if key in part else None for part in (mine, state))
        if ours == theirs or (key.startswith("projector.") and None in (ours, theirs)):
            continue
        check(theirs is not None, f"{path}: the weight {key} {ours} is missing")
        check(ours is not None, f"{path}: the weight {key} {theirs} does not belong to this model")
        raise InputError(f"{path}: {key} is {theirs}, this model needs {ours}")
    model.load_state_dict(state, strict=False, assign=assign)


# ------------------------------------------------------------------------------------------------
# The released formats.

def translate(checkpoint, path):
    """A released checkpoint -> {ema, step, config, origin} with our names and signs, blocks without copies.

    Recognised by content: MMGen (a head per modality), REPA (one head and a projector), SiT (one head with
    learned sigma). Raises InputError for anything else.
    """
    check(isinstance(checkpoint, dict), f"{path}: holds a {type(checkpoint).__name__}, expected a checkpoint")
    state = checkpoint.get("ema", checkpoint)
    state = bare(state) if _is_state(state) else {}
    needed = {"pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight",
              "blocks.0.attn.qkv.weight"}
    known = needed <= state.keys() and any("final_layer" in key for key in state)
    check(known, f"{path}: format is {checkpoint.get('format')!r}; "
          "expected a checkpoint of this project, of MMGen, REPA or SiT")
    heads = sum(key.startswith("lis_final_layer.") and key.endswith(".linear.weight") for key in state)
    modalities = RELEASED[:heads] or ("rgb",)
    channels = state["x_embedder.proj.weight"].shape[1] // len(modalities)
    outputs = len(state.get("final_layer.linear.bias", ()))
    origin = "MMGen" if heads else "REPA"
    if outputs == 2 * 4 * channels:  # of 2x2 patches: velocity and sigma
        origin = "SiT"
    ema = {}
    for key, value in state.items():
        for theirs, ours in RENAMED:
            key = ours + key.removeprefix(theirs) if key.startswith(theirs) else key
        if OUTPUT.fullmatch(key):
            value = value.unflatten(0, (4, -1))[:, :channels].flatten(0, 1) if origin == "SiT" else -value
        if origin == "SiT" and key == "t_embedder.mlp.0.weight":
            value = _of_noise_level(value)
        ema[key] = value
    config = _released_config(ema, checkpoint.get("args"), modalities, channels, path)
    return dict(ema=ema, step=int(checkpoint.get("steps", 0)), config=config, origin=origin)


def _of_noise_level(weight):
    """A time MLP's first layer (D, 256), which reads [cos, sin] of f_k t -> the one that gives the same when
    it reads those of f_k (1 - t): cos f t = cos f cos f(1 - t) + sin f sin f(1 - t), sin f t likewise.
    """
    f = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    of_cos, of_sin = weight.double().chunk(2, 1)
    turned = of_cos * f.cos() + of_sin * f.sin(), of_cos * f.sin() - of_sin * f.cos()
    return torch.cat(turned, 1).to(weight.dtype)


def _released_config(ema, args, modalities, channels, path):
    """A released checkpoint's config: the model by the weights' shapes, the cache as the papers have it."""
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    encoder_depth = args.get("encoder_depth", 8) if isinstance(args, dict) else 8
    _, tokens, width = ema["pos_embed"].shape
    names = {size[1]: name for name, size in SIZES.items()}
    check(width in names, f"{path}: width {width} is of no size known here ({', '.join(SIZES)})")
    side, classes = int(tokens ** 0.5) * 2, len(ema["y_embedder.weight"]) - 1
    shared = dict(modalities=list(modalities), num_classes=classes, latent_channels=channels,
                  latent_size=[side, side])
    model = dict(name=names[width], encoder_depth=int(encoder_depth),
                 fused_time="t_embedder.mlp_fused.0.weight" in ema,
                 task_embedding="task_embedder.weight" in ema, projector="projector.0.weight" in ema,
                 **shared)
    meta = dict(vae="sd-mse", vae_sha256=None, scale=SD_SCALE, resolution=8 * side,
                class_names=_imagenet_names(classes), palette=None, seg_mode="instance",
                depth_space="disparity", **shared)
    if len(modalities) > 1:
        meta["shown"] = RELEASED_SHOWN
    return dict(model=model, meta=meta, train={})


def _imagenet_names(classes):
    """ImageNet's wnids in the order of its classes; [] for another number of classes."""
    if classes != 1000:
        return []
    from timm.data import ImageNetInfo  # slow to import
    return ImageNetInfo().label_names()


def to_official(checkpoint, path):
    """A checkpoint of this project -> the dictionary that MMGen's own code loads: {model, ema, args, steps}.

    The middle heads and iREPA's projector, which it has not, are left out: neither changes the velocity.
    Raises InputError where their architecture has no place for it: other modalities, fusion or blocks.
    """
    config = checkpoint["config"]["model"]
    modalities, fusion = config["modalities"], config.get("fusion", "linear")
    scale = checkpoint["config"]["meta"]["scale"]
    check(tuple(modalities) == RELEASED and fusion == "linear" and config.get("task_embedding", True),
          f"{path}: modalities {', '.join(modalities)}, fusion {fusion}: MMGen's format takes "
          f"{', '.join(RELEASED)} with linear fusion and task embedding")
    blocks = config.get("blocks", "sit")
    check(blocks == "sit", f"{path}: has the blocks {blocks}; MMGen's format knows SiT's alone")
    check(scale == SD_SCALE, f"{path}: trained on latents of scale {scale}; "
          "MMGen's format knows the Stable Diffusion autoencoder alone")
    state = {}
    for key, value in checkpoint["ema"].items():
        if key.startswith("middle_heads.") or key in ("projector.weight", "projector.bias"):
            continue
        value = -value.float() if OUTPUT.fullmatch(key) else value.float()
        for theirs, ours in RENAMED:
            if ours != "heads.0." and key.startswith(ours):
                key = theirs + key.removeprefix(ours)
                break
        state[key] = value
    args = dict(model=f"SiT-{config['name']}", resolution=8 * config["latent_size"][0],
                num_tasks=len(RELEASED), num_classes=config["num_classes"], cfg_prob=0.1,
                encoder_depth=config["encoder_depth"], qk_norm=False, path_type="linear",
                is_mmcat_diff=True, use_decouple_task=True, use_taskcond_emb=True)
    return dict(model=state, ema=state, args=args, steps=checkpoint["step"])


def to_safetensors(ema, **told):
    """A checkpoint as the bytes of a safetensors file: its EMA, and in the metadata all else, as JSON.

    Under one key: safetensors writes several in any order, and weights are named by their bytes.
    """
    return save({key: value.contiguous() for key, value in ema.items()}, {"checkpoint": json.dumps(told)})


# ------------------------------------------------------------------------------------------------

def main():
    """Export a checkpoint's EMA, in our format or in the released one."""
    parser = command_parser(__doc__)
    parser.add_argument("--ckpt", required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--export", type=pathlib.Path, metavar="FILE",
                      help="write the EMA in bf16, without projector and optimiser; as its ending says, "
                      ".safetensors or torch's")
    what.add_argument("--export-official", type=pathlib.Path, metavar="FILE",
                      help="write the EMA as MMGen's own code loads it")
    parser.add_argument("--no-middle-heads", action="store_true",
                        help="export without the heads of internal guidance")
    args = parser.parse_args()
    path = args.export or args.export_official
    check_apart([path], [args.ckpt, locate(args.ckpt)])
    check(path.name != "latest.pt" or not path.exists(),
          f"{path}: is what a training run goes on from; give another name")
    safe = path.suffix == ".safetensors"
    check(args.export or not safe, f"{path}: MMGen's own code reads torch's files alone; give another ending")
    checkpoint = load_checkpoint(args.ckpt)
    if args.export:
        ema = {key: value.to(torch.bfloat16) for key, value in without_projector(checkpoint["ema"]).items()}
        config = checkpoint["config"]
        if args.no_middle_heads:
            ema = {key: value for key, value in ema.items() if not key.startswith("middle_heads.")}
            config = {**config, "model": {**config["model"], "middle_heads": False}}
        out = dict(ema=ema, step=checkpoint["step"], config=config, format=FORMAT)
        out |= {"ages": checkpoint["ages"]} if checkpoint.get("ages") else {}
    else:
        out = to_official(checkpoint, args.ckpt)
        shown = checkpoint["config"]["meta"].get("shown", {})
        if shown != RELEASED_SHOWN:
            print(f"warning: its maps were shown by {shown}; MMGen's are by {RELEASED_SHOWN}, which is what "
                  "the new file is taken for")
    if safe:
        with reading(args.ckpt, "its settings are no plain values; give another ending"):
            out = to_safetensors(**out)
    with whole_file(path) as file:
        if safe:
            file.write(out)
        else:
            torch.save(out, file)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
