"""Weights from elsewhere: MMGen's released ones, REPA's and SiT's in this project's terms; and back; and --init.

All have SiT's blocks and DiT's names. MMGen's and REPA's time runs from data to noise, so that their velocity is the
negative of ours: the last layer of each head is negated; what they embed is the noise level, as here. SiT's own velocity
has our sign, and its time too, so that its time layers do not fit; of its learned-sigma heads the first half is the velocity.
"""
import argparse
import pathlib
import re

import torch
import torch.nn.functional as F

from distributed import InputError

MODALITIES = ("rgb", "depth", "normal", "seg")  # of the released weights, in their order
SHAPES = {1152: "XL/2", 1024: "L/2", 768: "B/2", 384: "S/2", 192: "T/2"}
SD_SCALE = 0.18215
RENAMED = ((r"y_embedder\.embedding_table\.", "y_embedder."), (r"taskcond_embedder\.embedding_table\.", "task_embedder."),
           (r"lis_final_layer\.", "heads."), (r"final_layer\.", "heads.0."), (r"projectors\.0\.", "projector."))


def locate(path):
    """A checkpoint's file: of hf:owner/repository/file a local copy from the hub, of a run folder what its latest.pt is now -> Path.

    Raises InputError when it cannot be had.
    """
    if not str(path).startswith("hf:"):
        path = pathlib.Path(path)
        path = path / "latest.pt" if path.is_dir() else path
        return path.resolve() if path.name == "latest.pt" else path  # the run may go on meanwhile
    from huggingface_hub import hf_hub_download
    owner, name, *file = str(path)[3:].split("/") + [""] * 2
    file = [part for part in file if part]
    if not (owner and name and file):
        raise InputError(f"{path}: the form is hf:OWNER/REPOSITORY/FILE")
    try:
        return pathlib.Path(hf_hub_download(f"{owner}/{name}", "/".join(file)))
    except Exception as error:  # network, missing file, no permission: the hub raises many kinds
        raise InputError(f"{path}: not to be had from the hub ({type(error).__name__}); download {'/'.join(file)} from {owner}/{name} and give its path")


def translate(checkpoint, path):
    """A released checkpoint -> {ema, step, config, format, origin} with our names and signs, without copies of the blocks.

    Recognised by content: MMGen (a head per modality), REPA (one head and a projector), SiT (one head with learned sigma).
    Raises InputError for anything else.
    """
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: holds a {type(checkpoint).__name__}, expected a checkpoint")
    state = checkpoint.get("ema", checkpoint)
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()) or {"pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight"} - state.keys() \
            or not any("final_layer" in key for key in state):
        raise InputError(f"{path}: format is {checkpoint.get('format')!r}; expected a checkpoint of this project, of MMGen, REPA or SiT")
    heads = sum(key.startswith("lis_final_layer.") and key.endswith(".linear.weight") for key in state)
    sigma = not heads and len(state.get("final_layer.linear.bias", ())) == 8 * state["x_embedder.proj.weight"].shape[1]  # twice p*p*C
    origin = "MMGen" if heads else "SiT" if sigma else "REPA"
    modalities = MODALITIES[:heads] if heads else ("rgb",)
    width, channels = state["pos_embed"].shape[2], state["x_embedder.proj.weight"].shape[1] // len(modalities)
    ema = {}
    for key, value in state.items():
        for pattern, name in RENAMED:
            key = re.sub(f"^{pattern}", name, key)
        if re.fullmatch(r"heads\.\d+\.linear\.(weight|bias)", key):
            if origin == "SiT":  # (p*p, 2C, ...): the first C are the velocity
                value = value.unflatten(0, (4, -1))[:, :channels].flatten(0, 1)
            else:
                value = -value
        if origin != "SiT" or not key.startswith("t_embedder."):
            ema[key] = value
    side = int(state["pos_embed"].shape[1] ** 0.5) * 2
    args = checkpoint.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    try:
        model = dict(name=SHAPES[width], modalities=list(modalities), num_classes=len(ema["y_embedder.weight"]) - 1, latent_channels=channels,
                     latent_size=[side, side], encoder_depth=int(args.get("encoder_depth", 8)), task_embedding="task_embedder.weight" in ema,
                     projector="projector.0.weight" in ema)
    except KeyError as error:
        raise InputError(f"{path}: width {width} or {error} is of no size that this project knows ({', '.join(SHAPES.values())})")
    meta = dict(modalities=list(modalities), vae="sd-mse", vae_sha256=None, scale=SD_SCALE, latent_channels=channels, latent_size=[side, side],
                resolution=8 * side, num_classes=model["num_classes"], class_names=[], palette=None, seg_mode="instance", depth_space="disparity")
    return dict(ema=ema, step=int(checkpoint.get("steps", 0)), config=dict(model=model, meta=meta, train={}), origin=origin)


def to_official(checkpoint, path):
    """A checkpoint of this project -> the dictionary that MMGen's own code loads: {model, ema, args, steps}.

    Raises InputError where their architecture has no place for it: other modalities, another fusion.
    """
    config, ema = checkpoint["config"]["model"], checkpoint["ema"]
    if tuple(config["modalities"]) != MODALITIES or config.get("fusion", "linear") != "linear" or not config.get("task_embedding", True):
        raise InputError(f"{path}: modalities {', '.join(config['modalities'])}, fusion {config.get('fusion', 'linear')}: MMGen's format takes "
                         f"{', '.join(MODALITIES)} with linear fusion and task embedding")
    if checkpoint["config"].get("meta", {}).get("scale", SD_SCALE) != SD_SCALE:
        raise InputError(f"{path}: trained on latents of scale {checkpoint['config']['meta']['scale']}; MMGen's format knows the Stable Diffusion autoencoder alone")
    back = ((r"y_embedder\.", "y_embedder.embedding_table."), (r"task_embedder\.", "taskcond_embedder.embedding_table."), (r"heads\.", "lis_final_layer."),
            (r"projector\.", "projectors.0."))
    state = {}
    for key, value in ema.items():
        value = -value.float() if re.fullmatch(r"heads\.\d+\.linear\.(weight|bias)", key) else value.float()
        for pattern, name in back:
            key = re.sub(f"^{pattern}", name, key)
        state[key] = value
    args = dict(model=f"SiT-{config['name']}", resolution=8 * config["latent_size"][0], num_tasks=len(MODALITIES), num_classes=config["num_classes"],
                cfg_prob=0.1, encoder_depth=config["encoder_depth"], qk_norm=False, path_type="linear", is_mmcat_diff=True, use_decouple_task=True,
                use_taskcond_emb=True)
    return dict(model=state, ema=state, args=args, steps=checkpoint["step"])


@torch.no_grad()
def fit(model, meta, checkpoint, path, method="mmgen"):
    """--init: copy what fits of a checkpoint's EMA into the model, modalities and classes matched by name -> a table, as text.

    Where a modality is new, the columns through which it enters start at zero, so that the others keep their meaning; a
    class that the file does not know starts as its null class; positions are interpolated to another grid. method is the
    model's: of a checkpoint of the other one the heads are left out, what they predict is something else.
    Raises InputError when the latents are of another kind or nothing fits.
    """
    theirs = checkpoint["config"]
    for key in ("vae_sha256", "scale", "latent_channels"):
        if theirs["meta"][key] != meta[key] and theirs["meta"][key] is not None:
            raise InputError(f"--init {path}: its {key} is {theirs['meta'][key]}, the cache's is {meta[key]}; the latents would not mean the same")
    if theirs["model"]["name"] != model.config["name"]:
        raise InputError(f"--init {path}: is of size {theirs['model']['name']}; pass --model {theirs['model']['name']}")
    old, new = theirs["model"]["modalities"], list(model.modalities)
    everything, mine, foreign = checkpoint["ema"], model.state_dict(), theirs["train"].get("method", "mmgen") != method
    if any(key.startswith("backbone.") for key in everything):  # of MT-Diffusion
        everything = {key.removeprefix("backbone."): value for key, value in everything.items() if key.startswith("backbone.")}
    if method == "mt-diffusion" and not foreign:  # there a place has a role, whatever modality is in it
        old, new = ([f"place {i}" for i in range(len(names))] for names in (old, new))
    places = [(i, old.index(m)) for i, m in enumerate(new) if m in old]
    vectors = getattr(model.y_embedder, "in_features", None)  # in the place of classes
    state = {key: value for key, value in everything.items() if not (foreign and key.startswith("heads."))
             and not (key == "y_embedder.weight" and theirs["model"].get("features") != vectors)}
    classes = [list(names) for names in (theirs["meta"]["class_names"], meta["class_names"])]
    rows = {name: len(weights.get("y_embedder.weight", ())) for name, weights in (("old", state), ("new", mine))}
    same_classes = bool(vectors) or (rows["old"] == rows["new"] and (not classes[0] or classes[0] == classes[1]))
    fate, used = {}, set()
    for key, target in mine.items():
        numbered, source = re.match(r"((?:heads|x_embedder\.proj)\.)(\d+)(\..*)", key), key
        if numbered:  # one module per modality
            m = new[int(numbered[2])]
            source = key if old == new else f"{numbered[1]}{old.index(m)}{numbered[3]}" if m in old else None
        if source not in state:
            fate[key] = "new"
            continue
        value = state[source].to(target.dtype)
        joint = {"x_embedder.proj.weight": 1, "t_embedder.mlp_fused.0.weight": 1, "x_embedder.modality": 0, "task_embedder.weight": 0}.get(key)
        fate[key] = "taken"
        if key == "pos_embed" and value.shape != target.shape:
            grid = [s // theirs["model"].get("patch_size", 2) for s in theirs["model"]["latent_size"]]
            table = value.unflatten(1, grid).permute(0, 3, 1, 2)
            target.copy_(F.interpolate(table, model.grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2))
            fate[key] = "inflated"
        elif key == "y_embedder.weight" and not same_classes:
            rows = {name: value[i] for i, name in enumerate(classes[0])}
            target.copy_(torch.stack([rows.get(name, value[-1]) for name in classes[1]] + [value[-1]]))
            fate[key] = "inflated"
        elif joint is not None and old != new and value.shape[2:] == target.shape[2:]:
            first = int(key == "task_embedder.weight")  # its row 0 belongs to no modality
            parts, pieces = (x.narrow(joint, first, x.shape[joint] - first).chunk(len(names), joint) for x, names in ((value, old), (target, new)))
            if joint == 1:
                target.zero_()
            else:
                target[:first] = value[:first]
            for to, at in places:
                pieces[to].copy_(parts[at])
            fate[key] = "inflated"
        elif value.shape == target.shape:
            target.copy_(value)
        else:
            fate[key] = "new"
        used |= {source} if fate[key] != "new" else set()
    if "taken" not in fate.values():
        raise InputError(f"--init {path}: none of its {len(state)} weights fits this model; check --model")
    fate.update({f"{key} (file)": "left out" for key in everything if key not in used})
    lines = [f"--init {path} ({checkpoint.get('origin', 'ours')}, step {checkpoint['step']})"]
    for what in ("taken", "inflated", "new", "left out"):
        names = [key for key, value in fate.items() if value == what]
        groups = list(dict.fromkeys(re.sub(r"^(blocks)\..*|^(heads\.\d+|[a-z_]+)\..*", lambda m: m[1] or m[2], name) for name in names))
        lines.append(f"  {what:9s}{len(names):4d}  {', '.join(groups)}")
    return "\n".join(lines)
