"""Run every command of README.md, RECIPES.md and MT_DIFFUSION.md as written, small: on toy stand-ins, in
a copy.

    python studies/run_docs.py                       # about ten minutes on two cores
    python studies/run_docs.py --only mt_sample      # those with this text, and all training before them

What the reader is to bring (ImageNet, ScanNet, photos, Inception, VGG) is made of toy scenes and random
weights; numbers of scenes, steps and rows are cut; what needs the network or a large GPU is listed with the
reason.
"""
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval_fid  # noqa: E402
import modalities  # noqa: E402
import toy_scenes  # noqa: E402
import weights  # noqa: E402
from distributed import command_parser  # noqa: E402
from model import build_model  # noqa: E402

DOCS = ("README.md", "RECIPES.md", "MT_DIFFUSION.md")
SKIPPED = {  # text of a command: why it is not run
    "pip install": "the installation, which CI runs",
    "hf:jiepengwang": "the released weights, from the hub",
    "--init 0600000.pt": "the released weights",
    "SiT-XL-2-256x256.pt": "SiT's weights",
    "fd-dinov2": "DINOv2 from the hub, and a thousand pictures",
    "--nnodes": "two nodes",
    **{f"--format {name}": "a data set of others, whose form its tests draw"
       for name in ("7scenes", "tum", "nyu", "hypersim", "camvid", "cityscapes")},
    "--color room/color": "the same",
    "run_study.sh": "hours; its commands are run one by one",
    "run_mt.sh": "hours",
    "ten_minutes.sh": "ten minutes; its commands are run one by one",
    "measure_steps.py": "an hour: settings of up to 250 evaluations",
    "XL/2": "a GPU",
}
SMALL = {"--toy": "8", "--num": "8", "--batch-size": "8", "--micro-batch": "4", "--steps": "2",
         "--model": "T/2", "--class-id": "3",
         "--generate": "8", "--minutes": "0.2", "--crop": "64", "--latent-size": "8", "--size": "64"}
MORE = {  # script: flags that it gets where the command does not have them
    "train.py": {"--model": "T/2", "--steps": "2", "--batch-size": "8"},
    "mt_diffusion.py": {"--model": "T/2", "--steps": "2", "--batch-size": "8"},
    "toy_vae.py": {"--steps": "2", "--scenes": "8", "--batch-size": "4"},
    "sample.py": {"--steps": "2"},
    "mt_sample.py": {"--steps": "2"},
    "eval_depth.py": {"--steps": "2"},
    "studies/measure_demo.py": {"--num": "8", "--generate": "12"},
}
BROUGHT = {  # names in the text: the stand-in that has the right files
    "eval_fid.py samples/generate ": "eval_fid.py generated ",
    "--pred samples/understand": "--pred predictions",
    "--pred theirs": "--pred squares --alignment depth",
    "runs/mmgen/ckpt/0400000.pt": "runs/mmgen",
    "--out demo/": "--out made/",
    "--export demo/": "--export made/",
    "restored truth": "restored truth_pictures",
    "data/scans --vae taesd": "data/scans --vae toy",
    "data/camvid-cache": "data/cache",
    "data/rooms-cache data/driving-cache data/photos-cache --weights 2 2 1": "data/scans-cache data/cache "
                                                                             "--weights 2 1",
    "data/rooms-test --mean-of data/rooms": "data/scans --mean-of data/scans",
}


def commands(text):
    """The commands of a page's bash fences, a line each, without comments."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield shlex.join(words)


def shortened(command):
    """A command of the text -> the words that are run: script and flags."""
    for old, new in BROUGHT.items():
        command = command.replace(old, new)
    command = re.sub(r"--(depth|normal|seg) (hf|hub):\S+", r"--\1 py:teachers:\1", command)
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    words = [word for word in words[script:] if word != "--compile"]  # takes minutes at first
    for i, word in enumerate(words[:-1]):
        if word in SMALL:
            words[i + 1] = SMALL[word]
    if "--fast" not in words and "--pred" not in words:
        for flag, value in MORE.get(words[0], {}).items():
            words += [] if flag in words else [flag, value]
    if words[0] == "prep_latents.py" and "--data" in words:
        words += ["--no-dino"]
        for flag, value in {"--vae": "toy", "--size": "64"}.items():
            words += [] if flag in words else [flag, value]
    return words


# ------------------------------------------------------------------------------------------------
# Stand-ins.

def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def save_scene(folder, i):
    """Scene i in all the trees and folders of the text."""
    scene = toy_scenes.render(toy_scenes.HELD_OUT + i)
    name = f"{toy_scenes.CLASSES[scene.label].replace(' ', '_')}/{i}"
    disparity = 1 / scene.depth
    maps = {"normal": ((scene.normal * 0.5 + 0.5) * 255).round().astype(np.uint8),
            "seg": toy_scenes.PALETTE[scene.seg], "rgb": scene.rgb}
    for tree in ("imagenet_mm", "imagenet_val", "scenes", "truth", "predictions"):
        for modality, picture in maps.items():
            save(folder / tree / modality / f"{name}.png", picture)
    for tree in ("cityscapes_train", "cityscapes_val"):  # its segments are labels
        save(folder / tree / "rgb" / f"{name}.png", scene.rgb)
        save(folder / tree / "seg" / f"{name}.png", scene.seg.astype(np.uint8))
    for tree in ("imagenet_mm", "imagenet_val"):
        save(folder / tree / "depth" / f"{name}.png", (disparity / disparity.max() * 255).astype(np.uint8))
    for tree, depth in (("scenes", scene.depth), ("truth", scene.depth), ("predictions", disparity)):
        save(folder / tree / "depth" / f"{name}.npy", depth)
    for root in ("scannet", "scans"):
        save(folder / root / "s/color" / f"{i}.jpg", scene.rgb)
        save(folder / root / "s/depth" / f"{i}.png", (scene.depth * 1000).astype(np.uint16))
    save(folder / "photos" / f"{i}.jpg", scene.rgb)
    save(folder / "generated/rgb" / f"{i}.png", scene.rgb)
    for tree in ("restored", "truth_pictures"):
        save(folder / tree / f"{i}.png", scene.rgb)
    return scene


def bring(folder):
    """All that the reader brings but for weights."""
    for i in range(8):
        scene = save_scene(folder, i)
    for tree in ("scenes", "truth"):  # depth in metres; the others hold disparity
        modalities.write_facts(folder / tree, depth_space="depth")
    hole = np.zeros((64, 64), np.uint8)
    hole[10:30, 20:40] = 255
    for name in ("photo.png", "photo.jpg"):
        save(folder / name, scene.rgb)
    for name in ("hole.png", "depth.png"):
        save(folder / name, hole)
    save(folder / "vectors.npy", np.ones((2, 768), np.float32))
    (folder / "palette.json").write_text(str(toy_scenes.PALETTE.tolist()))
    (folder / "scannet_val_sampled_list_800_1.txt").write_text("s/color/0.jpg s/depth/0.png\n")
    for name in ("teachers.py", "depth_anything.py"):
        (folder / name).write_text(
            "import numpy as np\n"
            "def depth(image): return np.asarray(image.convert('L'), float)\n"
            "def normal(image): return np.asarray(image)\n"
            "def seg(image): return np.asarray(image.convert('L')) // 64\n")
    bring_indices(folder)
    pictures = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    for size in (64, 128, 256):
        np.savez(folder / f"VIRTUAL_imagenet{size}_labeled.npz", arr_0=pictures)


def bring_indices(folder):
    """Indices of a tree's files, with our keys and with the released code's."""
    names = sorted(path.relative_to(folder / "scenes/rgb") for path in (folder / "scenes/rgb").rglob("*.png"))
    ours, theirs = [], []
    for name in names:
        files = {m: f"scenes/{m}/{name}" for m in ("rgb", "normal", "seg")}
        files["depth"] = f"scenes/depth/{name.with_suffix('.npy')}"
        ours.append({**files, "class": name.parent.name})
        renamed = {f"path_{m}".replace("seg", "mask"): path for m, path in files.items()}
        theirs.append({**renamed, "cat": "indoor", "idx_cat": 1000, "path_rel_rgb": str(name)})
    for file, lines in (("index.jsonl", ours), ("hypersim.jsonl", theirs)):
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))


def bring_weights(folder):
    """Random weights in the released formats, where the commands look for them."""
    import timm
    torch.manual_seed(0)
    inception = folder / "hub/hub/checkpoints" / eval_fid.INCEPTION.rsplit("/")[-1]
    inception.parent.mkdir(parents=True)
    torch.save(eval_fid.Inception().state_dict(), inception)
    trunk = timm.create_model("vgg16", num_classes=0).features.state_dict()
    torch.save({f"features.{key}": value for key, value in trunk.items()}, folder / "vgg16-397923af.pth")
    widths = (64, 128, 256, 512, 512)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
    torch.save(heads, folder / "vgg.pth")
    model = build_model("T/2", num_classes=12, latent_size=8)  # what fine-tuning the released weights leaves
    meta = dict(vae="sd-mse", vae_sha256=None, scale=weights.SD_SCALE, latent_channels=4, latent_size=[8, 8],
                resolution=64, palette=None, class_names=[], num_classes=12, depth_space="disparity")
    run = folder / "runs/mine"
    run.mkdir(parents=True)
    torch.save({"ema": model.state_dict(), "step": 1, "format": weights.FORMAT,
                "config": {"model": model.config, "meta": meta, "train": {}}}, run / "latest.pt")
    os.utime(run / "latest.pt", (0, 0))  # the newest run is another one


def copy_project(folder):
    """The project's files as they are."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


# ------------------------------------------------------------------------------------------------

def main():
    """Run the commands in the pages' order, a line each; exit code 1 where one failed."""
    parser = command_parser(__doc__)
    parser.add_argument("--only", default="", help="text of the commands to run; training is run anyway")
    args = parser.parse_args()
    counts = {"ok": 0, "FAILED": 0, "skipped": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        copy_project(folder)
        bring(folder)
        bring_weights(folder)
        environment = {**os.environ, "TORCH_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
        seen = set()
        for page in DOCS:
            for command in commands((ROOT / page).read_text()):
                trains = re.search(r"(train|mt_diffusion|prep_latents|pseudo_label)\.py", command)
                if command in seen or not (args.only in command or trains):
                    continue
                seen.add(command)
                why = next((reason for text, reason in SKIPPED.items() if text in command), None)
                if why:
                    counts["skipped"] += 1
                    print(f"skipped  {page}: {command[:120]}  ({why})", flush=True)
                    continue
                start = time.perf_counter()
                done = subprocess.run([sys.executable, *shortened(command)], cwd=folder, env=environment,
                                      capture_output=True, text=True)
                state = "FAILED" if done.returncode else "ok"
                counts[state] += 1
                seconds = time.perf_counter() - start
                print(f"{state:7s} {seconds:4.0f} s  {page}: {command[:140]}", flush=True)
                if done.returncode:
                    print("   ran:", shlex.join(shortened(command)))
                    print("   ", (done.stderr.strip().splitlines() or [""])[-1], flush=True)
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    sys.exit(1 if counts["FAILED"] else 0)


if __name__ == "__main__":
    main()
