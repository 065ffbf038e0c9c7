"""MT_DIFFUSION.md: its commands run as written, on toy stand-ins, and each row of the paper's tables trains
what the paper says.
"""
import contextlib
import io
import json
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn as nn

import eval_fid
import mt_diffusion
import train
from conftest import ROOT, start
from dataset import Cache
from distributed import InputError, command_parser, with_row
from model import SIZES
from mt_model import MTSchedule
from studies import run_docs
from weights import load_checkpoint

PAGE = (ROOT / "MT_DIFFUSION.md").read_text()
LEFT_OUT = {"studies/": "measures for minutes; studies/run_docs.py runs it"}  # text of a command: why


COMMANDS = [command for command in run_docs.commands(PAGE) if not any(text in command for text in LEFT_OUT)]


class Pool(eval_fid.InceptionNetwork):
    """In Inception's place: some pixels."""

    def __init__(self, files, work):
        self.id = {"inception_sha256": "stand-in"}

    def __call__(self, pictures):
        pixels = torch.from_numpy(np.stack(pictures)).float().flatten(1)  # (n, H*W*3)
        return {"pool": pixels[:, :8], "spatial": pixels[:, -8:], "logits": pixels[:, :8] / 255}


class Distance(eval_fid.Lpips):
    """In VGG's place: the mean square."""

    def __init__(self, files, work):
        nn.Module.__init__(self)
        assert files.vgg.name == "vgg16-397923af.pth" and files.lpips_heads.name == "vgg.pth"
        self.shift, self.id = torch.zeros(1), {"lpips": "stand-in"}

    def forward(self, a, b):
        return (a - b).square().mean((1, 2, 3))


@pytest.fixture(scope="module")
def page(one_thread, tmp_path_factory):
    """The folder where the page's commands have run in their order, {command: what it printed}, and
    {command: why it failed}.

    What the reader brings and the numbers are those of studies/run_docs.py, but for fewer samples and a
    smaller network.
    """
    folder, printed, failed = tmp_path_factory.mktemp("page"), {}, {}
    run_docs.bring(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(SIZES, "T/2", (2, 48, 2, 1))
        patch.setitem(eval_fid.NETWORKS, "inception", Pool)
        patch.setitem(eval_fid.NETWORKS, "vgg", Distance)
        for flag in ("--num", "--batch-size", "--toy"):
            patch.setitem(run_docs.SMALL, flag, "4")
        start("prep_latents", "--toy", 4, "--no-dino", "--out", "data/cache")  # README.md makes it
        for command in COMMANDS:
            script, *flags = run_docs.shortened(command)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                try:
                    start(script.removesuffix(".py"), *flags)
                except (InputError, SystemExit) as error:
                    failed[command] = error
            printed[command] = out.getvalue()
        yield folder, printed, failed


def value_of(command, flag):
    """What a command says after a flag, None without it."""
    found = re.search(rf"{flag} (\S+)", command)
    return found and found[1]


def test_every_command_runs_and_writes_what_it_names(page):
    folder, _, failed = page
    assert not failed and len(COMMANDS) > 40
    for command in COMMANDS:
        made = [value_of(command, flag) for flag in ("--run", "--json")]
        made += [value_of(command, "--out")] if "--pred" not in command else []
        assert all((folder / path).exists() for path in made if path), command


def test_the_scores_are_those_of_the_tables(page):
    folder, printed, _ = page
    [translation] = [text for command, text in printed.items() if "--cityscapes-eps" in command]
    assert "pixel_accuracy" in translation and "class_accuracy" in translation and "miou" in translation
    meta = json.loads((folder / "data/cityscapes/meta.json").read_text())
    palette = json.loads((folder / "palette.json").read_text())
    assert meta["seg_mode"] == "semantic" and meta["palette"] == palette
    restored = [text for command, text in printed.items() if "--lpips-heads" in command]
    assert len(restored) == 3 and len(set(restored)) == 3
    assert all("lpips" in text and "psnr" in text for text in restored)
    curves = [text for command, text in printed.items() if "--out f6/" in command]
    assert len(curves) == 2 and all("top-5" in text and "of 8 pictures" in text for text in curves)
    told = [path.read_text() for path in sorted((folder / "t2/m-star/classes").iterdir())]
    assert [json.loads(text)[0][1] for text in told] == [0, 1, 2, 3]


class Row(NamedTuple):
    """What a row of the tables trains."""
    pair: str
    seen: float        # share of rows whose X the network sees
    alone: float       # share of plain DDPM given X
    carries: float     # share of rows with E(X) in z
    weights: tuple     # of the noise and of X in the loss
    init: str = None
    head: str = "middle"


BOTH, NOISE, X = (1, 0.1), (1, 0), (0, 0.1)
ROWS = {  # by the run's name
    "x": Row("masked", 0.9, 0, 0.9, BOTH),
    "u": Row("masked-u", 0, 0, 1, BOTH),
    "m": Row("label", 0, 0, 1, BOTH),
    "m-star": Row("label", 0.3, 0.3, 0.7, BOTH, "runs/m"),
    "e": Row("label", 0, 0, 1, BOTH, None, "output"),
    "e-star": Row("label", 0.3, 0.3, 0.7, BOTH, "runs/e", "output"),
    "uncond": Row("masked-u", 0, 0, 0, NOISE),
    "cond": Row("label", 1, 1, 0, NOISE),
    "x128": Row("masked", 0.9, 0, 0.9, BOTH),
    "x128-f": Row("masked", 1, 0, 0, NOISE, "runs/x128"),
    "e-classifier": Row("label", 0, 0, 0, X, "runs/e", "output"),
    "classifier": Row("label", 0, 0, 0, X, None, "output"),
    "classifier-continued": Row("label", 0, 0, 0, X, "runs/classifier", "output"),
    "cityscapes": Row("pair", 1, 0, 1, BOTH),
    "cityscapes-single": Row("pair", 1, 0, 0, NOISE),
}


def flags_of(command):
    """A training command's flags as it understands them."""
    parser = command_parser("")
    train.add_flags(parser)
    mt_diffusion.Objective.add_flags(parser)
    words = command.split()
    words = words[words.index("mt_diffusion.py") + 1:]
    return parser.parse_args(with_row(words, "--preset", mt_diffusion.PRESETS))


class Reached(Exception):
    """Raised in the place of the network's forward pass."""


def noised(objective, rows):
    """The z that the objective's loss makes of rows."""
    found, original = [], objective.model.schedule.q_sample

    def q_sample(*arguments):
        found.append(original(*arguments))
        raise Reached

    objective.model.schedule.q_sample = q_sample
    with pytest.raises(Reached):
        objective.loss(None, rows)
    return found[0]


def of_tables():
    """{run: the command of the paper's tables that trains it}."""
    tables = PAGE.split("## The paper's tables")[1].split("## Measured")[0]
    trains = [command for command in run_docs.commands(tables) if "mt_diffusion.py" in command]
    return {value_of(command, "--run").removeprefix("runs/"): command for command in trains}


def test_every_row_is_known():
    assert of_tables().keys() == ROWS.keys()


@pytest.mark.parametrize("run", ROWS)
def test_a_row_trains_what_the_paper_says(run, page, monkeypatch):
    row, args, N = ROWS[run], flags_of(of_tables()[run]), 200
    monkeypatch.setitem(SIZES, "T/2", (2, 48, 2, 1))
    args.model, args.batch_size = "T/2", N
    cache = Cache(page[0] / args.data[0])
    objective = mt_diffusion.Objective(args, cache, torch.device("cpu"))
    for p in objective.model.parameters():
        torch.nn.init.normal_(p, std=0.04)  # else E of a label is zero
    batch = cache.gather(cache.order(0, 0, N), objective.reads)
    batch["known"] = torch.ones(N, len(objective.modalities))
    rows, counts = objective.prepare(0, batch, slice(0, N))
    plain = MTSchedule.make(objective.setting.schedule, ["none"])
    without = plain.q_sample(rows["z0"], [torch.zeros_like(rows["z0"])], rows["k"], rows["noise"])
    carries = (noised(objective, rows) != without).flatten(1).any(1)
    found = [share.float().mean().item() for share in (rows["seen"], rows["alone"], carries)]
    assert found == pytest.approx([row.seen, row.alone, row.carries], abs=0.1)
    for exact, share in zip((row.seen, row.alone, row.carries), found):  # all rows or none: not nearly
        assert exact not in (0, 1) or share == exact
    assert objective.kind == row.pair and objective.weights.tolist() == pytest.approx([*row.weights, 0])
    assert str(args.init or "") == (row.init or "") and args.head == row.head
    assert (objective.model.classifier is not None) == (row.head == "output")
    assert counts[1] == N - rows["alone"].sum()


def test_generation_alone_sees_nothing_of_the_image(page, monkeypatch):
    """Table 3's f: X is zeros wherever the setting's own mix mostly shows the image."""
    monkeypatch.setitem(SIZES, "T/2", (2, 48, 2, 1))
    shown = {}
    for run in ("x128", "x128-f"):
        args = flags_of(of_tables()[run])
        args.model, args.batch_size, cache = "T/2", 100, Cache(page[0] / args.data[0])
        objective = mt_diffusion.Objective(args, cache, torch.device("cpu"))
        batch = {**cache.gather(cache.order(0, 0, 100), objective.reads), "known": torch.ones(100, 1)}
        x = objective.prepare(0, batch, slice(0, 100))[0]["x"]
        shown[run] = (x != 0).flatten(1).any(1).float().mean().item()
    assert shown["x128"] > 0.8 and shown["x128-f"] == 0


def test_translation_is_of_rgb_to_segments(page):
    for run in ("cityscapes", "cityscapes-single"):
        config = load_checkpoint(page[0] / "runs" / run)["config"]
        assert config["model"]["modalities"] == ["seg", "rgb"]  # target, source
        assert config["train"]["lr"] == 1e-4


@pytest.mark.parametrize("name, lr, batch, steps", (
    ("translation", 1e-4, 32, 600_000), ("masked", 7e-5, 80, 1_000_000), ("masked-128", 7e-5, 80, 600_000),
    ("label", 7e-5, 75, 1_000_000), ("feature", 1e-5, 2048, 600_000)))
def test_presets_are_the_papers_and_the_pages(name, lr, batch, steps):
    """Appendix E's figures."""
    preset = mt_diffusion.PRESETS[name]
    args = flags_of(f"mt_diffusion.py --preset {name}")
    assert (args.lr, args.batch_size, args.steps) == (lr, batch, steps)
    assert f"| `{name}` | `{preset}` |" in PAGE
    own = flags_of(f"mt_diffusion.py --lr 1e-4 --preset={name} --batch-size 8")
    assert (own.lr, own.batch_size, own.pair) == (1e-4, 8, args.pair)
    assert len(mt_diffusion.PRESETS) == 5
