"""eval_fid.py against closed forms, a direct computation, and the reference packages where installed."""
import hashlib
import json
import math
import os
import sys

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import eval_fid
from conftest import shell
from distributed import InputError


def drawn_inception(seed=0):
    """Random weights in the released file's format, scaled so that features neither vanish nor explode."""
    g = torch.Generator().manual_seed(seed)
    state = eval_fid.Inception().state_dict()
    for key, value in state.items():
        if key.endswith("conv.weight"):
            state[key] = torch.randn(value.shape, generator=g) * math.sqrt(2 / value[0].numel())
        elif key.endswith(("bn.weight", "running_var")):
            state[key] = torch.rand(value.shape, generator=g) * 0.4 + 0.8
        elif key == "fc.weight":
            state[key] = torch.randn(value.shape, generator=g) * 0.2
        elif key.endswith(("bn.bias", "running_mean", "fc.bias")):
            state[key] = torch.randn(value.shape, generator=g) * 0.1
    return state


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(drawn_inception(), path)
    return path


def pictures(path, count, seed, size=32):
    """Blobs of colour, so that the network sees something: uint8 (count, size, size, 3), written as arr_0."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.integers(0, 256, (count, 3, 5, 5)).astype(np.float32))
    array = F.interpolate(coarse, size, mode="bicubic").clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    np.savez(path, arr_0=array)
    return array


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return folder, pictures(folder / "a.npz", 6, 1), pictures(folder / "b.npz", 5, 2)


@torch.inference_mode()
def direct(path, array):
    """Features by one plain pass over all pictures."""
    model = eval_fid.Inception().eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    x = eval_fid.PREPROCESS["adm"](torch.from_numpy(array).permute(0, 3, 1, 2).float())
    return {k: v.double().numpy() for k, v in model(x).items()}


def sample_distance(a, b):
    """The Frechet distance from the features themselves: tr (S1 S2)^1/2 is the nuclear norm of the centred
    sets' product.
    """
    x, y = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (a, b))
    shared = scipy.linalg.svdvals(x @ y.T).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + (x ** 2).sum() + (y ** 2).sum() - 2 * shared


def brute_precision_recall(a, b, k=3):
    def distance(x, y):
        return ((x[:, None] - y[None]) ** 2).sum(-1)

    def radius(x):
        return np.sort(distance(x, x), 1)[:, k]

    return (distance(a, b) <= radius(b)).any(1).mean(), (distance(b, a) <= radius(a)).any(1).mean()


def test_whole_command_equals_a_direct_computation(command, inception, sets, tmp_path):
    folder, a, b = sets
    out = []
    without_frechet = ("is", "precision", "recall")
    for name, processes, batch, metrics in (("one", 1, 16, eval_fid.DEFAULT), ("two", 2, 5, without_frechet)):
        arguments = (folder / "a.npz", folder / "b.npz", "--inception", inception, "--batch-size", batch,
                     "--metrics", *metrics,
                     "--json", tmp_path / f"{name}.json", "--save-stats", tmp_path / f"{name}.npz")
        if processes == 1:
            assert "rank-deficient" in command("eval_fid", *arguments)
        else:
            result = shell("eval_fid.py", *arguments, processes=processes)
            assert result.returncode == 0, result.stderr
        result = json.loads((tmp_path / f"{name}.json").read_text())
        out.append((result, dict(np.load(tmp_path / f"{name}.npz"))))
    (got, stats), (again, stats_again) = out
    x, y = direct(inception, a), direct(inception, b)
    p = np.exp(torch.from_numpy(x["logits"]).log_softmax(1).numpy())
    score = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    precision, recall = brute_precision_recall(x["pool"], y["pool"])
    assert got["fid"] == pytest.approx(sample_distance(x["pool"], y["pool"]), rel=1e-4)
    assert got["sfid"] == pytest.approx(sample_distance(x["spatial"], y["spatial"]), rel=1e-4)
    assert math.log(got["is"]) == pytest.approx(math.log(score), rel=1e-3) and score > 1.001
    assert (got["precision"], got["recall"]) == pytest.approx((precision, recall), abs=1e-12)
    assert got["rank_deficient"] is True and got["recipe"]["samples"]["count"] == 6
    assert np.allclose(stats["mu"], x["pool"].mean(0), rtol=1e-5, atol=1e-6)
    assert np.allclose(stats["sigma_s"], np.cov(x["spatial"], rowvar=False), atol=1e-5)
    for key in ("mu", "sigma", "mu_s", "sigma_s"):
        assert np.abs(stats[key] - stats_again[key]).max() <= 1e-9 * max(1, np.abs(stats[key]).max())
    for key in ("is", "precision", "recall"):
        assert got[key] == pytest.approx(again[key], rel=1e-6)


def test_inception_is_the_one_that_was_compared():
    """Norms and two features of drawn weights, recorded when the network equalled pytorch-fid's."""
    model = eval_fid.Inception().eval()
    model.load_state_dict(drawn_inception())
    y, x = torch.meshgrid(torch.arange(299.0), torch.arange(299.0), indexing="ij")
    picture = torch.stack([torch.sin(x / 9), torch.cos(y / 7), torch.sin((x + y) / 20)])[None]
    with torch.inference_mode():
        found = model(picture)
    for name, recorded in (("pool", (38.04726, 1.26028, 0.0179122)), ("spatial", (56.76939, 0, 3.494303)),
                           ("logits", (245.33824, -10.124265, -5.555303))):
        features = found[name].double()
        assert (features.norm().item(), *features[0, [5, 700]].tolist()) == pytest.approx(recorded, rel=1e-3)


def test_preparation_and_crop(tmp_path):
    white = torch.full((1, 3, 8, 8), 255.0)
    for name, black, level in (("pytorch_fid", -1, 1), ("adm", -1, 127 / 128)):
        prepare = eval_fid.PREPROCESS[name]
        assert (prepare(white) - level).abs().max() < 1e-5 and (prepare(white * 0) - black).abs().max() < 1e-5
    pictures(tmp_path / "a.npz", 2, 1)
    cropped = eval_fid.open_source(tmp_path / "a.npz", 16).read(range(2))
    assert [picture.shape for picture in cropped] == [(16, 16, 3)] * 2


def test_dinov2_sees_standardised_pictures(monkeypatch):
    """Of 224 pixels; a transformer of one block in its place."""
    def small(name, path, remedy):
        assert name == "vit_large_patch14_dinov2.lvd142m"
        return timm.models.VisionTransformer(img_size=518, patch_size=14, embed_dim=16, depth=1, num_heads=2,
                                             num_classes=0).eval()

    monkeypatch.setattr(eval_fid, "timm_model", small)
    work = eval_fid.Work(0, 1, torch.device("cpu"), 1)
    network, seen = eval_fid.DinoNetwork(eval_fid.Weights(), work), []
    network.model.register_forward_pre_hook(lambda model, given: seen.append(given[0]))
    with torch.inference_mode():
        assert network([np.full((32, 40, 3), 255, np.uint8)])["cls"].shape == (1, 16)
    assert seen[0].shape == (1, 3, 224, 224)
    white = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert seen[0][0, :, 9, 9].tolist() == pytest.approx(white)


def test_kernel_distance_by_hand():
    def kernel(a, b):
        return (float(a.double() @ b.double()) / 4 + 1) ** 3

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g) + 1
    own = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(6) for j in range(6) if i != j) / 30
    cross = sum(kernel(a, b) for a in x for b in y) / 36
    found = eval_fid.kernel_distance(x, y, subsets=2, size=6)
    assert found["kid"] == pytest.approx(own - 2 * cross) and found["kid_std"] < 1e-9


def test_saved_statistics_and_folders_stand_for_the_pictures(command, inception, sets, tmp_path):
    folder, a, b = sets
    for i, picture in enumerate(b[:3]):
        (tmp_path / "b").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "b" / f"{i:03d}.png")
    np.savez_compressed(tmp_path / "b.npz", arr_0=b[:3])
    common = ("--inception", inception, "--metrics", "fid", "--json", tmp_path / "out.json")

    def read():
        return json.loads((tmp_path / "out.json").read_text())

    command("eval_fid", tmp_path / "b", "--inception", inception, "--save-stats", tmp_path / "stats.npz")
    command("eval_fid", tmp_path / "b.npz", tmp_path / "stats.npz", *common)
    assert abs(read()["fid"]) < 1e-3 and read()["recipe"]["reference"]["count"] == 3
    text = command("eval_fid", tmp_path / "b.npz", tmp_path / "stats.npz", "--inception", inception,
                   "--metrics", "is", "precision", "--json", tmp_path / "out.json")
    assert read()["precision"] is None and "precision: left out" in text


def test_frechet_distance_closed_forms():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(64, 64, generator=g, dtype=torch.float64)
    sigma, mu = a @ a.T, torch.randn(64, generator=g, dtype=torch.float64)
    assert eval_fid.frechet(mu, sigma, mu + 0.5, sigma) == pytest.approx(64 * 0.25, abs=1e-6)
    d1, d2 = (torch.rand(64, generator=g, dtype=torch.float64) for _ in range(2))
    want = float((d1.sqrt() - d2.sqrt()).square().sum())
    assert eval_fid.frechet(mu, d1.diag(), mu, d2.diag()) == pytest.approx(want, abs=1e-9)


def test_inception_score_closed_forms(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, logits):
            self.logits = logits

        def __call__(self, block):
            rows = [int(p[0, 0, 0]) * 256 + int(p[0, 0, 1]) for p in block]
            return {"pool": torch.zeros(len(rows), 4), "logits": self.logits(torch.tensor(rows))}

    array = np.zeros((1008, 1, 1, 3), np.uint8)
    array[:, 0, 0, 0], array[:, 0, 0, 1] = np.divmod(np.arange(1008), 256)
    np.savez(tmp_path / "n.npz", arr_0=array)
    monkeypatch.setattr(eval_fid, "IS_CHUNK", 1008)
    source = eval_fid.open_source(tmp_path / "n.npz")
    work = eval_fid.Work(0, 1, torch.device("cpu"), 100)

    def score(logits):
        known = eval_fid.extract(source, Fake(logits), set(), work)
        return eval_fid.inception_score(*known["scores", "logits"])

    def uniform(rows):
        return torch.zeros(len(rows), 1008)

    def one_hot(rows):
        return 1e4 * F.one_hot(rows, 1008).float()

    assert score(uniform) == pytest.approx(1, abs=1e-9)
    assert score(one_hot) == pytest.approx(1008, rel=1e-9)
    monkeypatch.setattr(eval_fid, "IS_CHUNK", 300)  # of 300, 300, 300 and 108 pictures, of classes of its own
    assert score(one_hot) == pytest.approx((300 * 3 + 108) / 4, rel=1e-9)


@pytest.mark.parametrize("size", (64, 256, 299, 300))
def test_tf_resize_of_a_ramp(size):
    ramp = torch.arange(size, dtype=torch.float32).expand(1, 3, size, size)
    want = torch.tensor([min(i * size / 299, size - 1) for i in range(299)])
    got = eval_fid.tf_resize(ramp)
    assert (got[0, 0, 0] - want).abs().max() < 1e-4
    assert torch.equal(eval_fid.tf_resize(ramp.transpose(2, 3)), got.transpose(2, 3))


def test_precision_recall_against_brute_force():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((300, 16)), rng.standard_normal((200, 16)) * 1.3 + 0.3
    got = eval_fid.precision_recall(torch.from_numpy(a).float(), torch.from_numpy(b).float(), elements=1000)
    assert got == pytest.approx(brute_precision_recall(a, b), abs=1e-9) and 0.2 < got[1] < got[0] < 1


def test_pictures_of_any_kind(tmp_path):
    grey = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a 16 bit.png")
    Image.fromarray((grey // 257).astype(np.uint8)).save(tmp_path / "b.png")
    Image.new("RGBA", (10, 12), (255, 0, 0, 0)).save(tmp_path / "c.png")
    a, b, c = eval_fid.open_source(tmp_path).read(range(3))
    assert a.shape == (48, 64, 3) and np.abs(a.astype(int) - b).max() <= 1
    assert c.shape == (12, 10, 3) and (c == 255).all()
    assert eval_fid.tf_resize(torch.tensor(c).permute(2, 0, 1)[None].float()).shape == (1, 3, 299, 299)


def test_latent_distance_is_never_called_fid(command, tmp_path):
    pictures(tmp_path / "a.npz", 20, 1, 64), pictures(tmp_path / "b.npz", 20, 2, 64)
    text = command("eval_fid", tmp_path / "a.npz", tmp_path / "b.npz", "--metrics", "latent-fd",
                   "--json", tmp_path / "o.json")
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["latent_fd"] > 0 and "fid" not in result and "fid " not in text
    pictures(tmp_path / "c.npz", 20, 2, 32)
    with pytest.raises(InputError, match="one size for all"):
        command("eval_fid", tmp_path / "a.npz", tmp_path / "c.npz", "--metrics", "latent-fd")


# ------------------------------------------------------------------------------------------------
# Pairs.

def folder_of(path, named):
    """A folder of pictures {name: uint8 (H, W, 3)}."""
    for name, picture in named.items():
        file = path / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    return path


def strict(path):
    """A JSON file, read as the standard has it: without NaN and Infinity."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")
    return json.loads(path.read_text(), parse_constant=refuse)


def test_psnr_closed_forms_and_valid_json(command, tmp_path):
    grey = np.random.default_rng(0).integers(0, 200, (12, 9, 3)).astype(np.uint8)
    truth = folder_of(tmp_path / "truth", {"n01/a": grey, "n01/b": grey, "n02/a": grey})
    made = folder_of(tmp_path / "made", {"n01_a": grey + 1, "n01_b": grey + 8, "n02_a": grey})
    command("eval_fid", made, truth, "--metrics", "psnr", "--json", tmp_path / "o.json")
    result = strict(tmp_path / "o.json")
    want = [20 * math.log10(255 / k) for k in (1, 8)]
    assert result["psnr"] == pytest.approx(sum(want) / 2, rel=1e-12)
    assert result["psnr_infinite"] == 1 and result["recipe"]["samples"]["count"] == 3
    one = shell("eval_fid.py", made, truth, "--metrics", "psnr", "--json", tmp_path / "two.json", processes=2)
    assert one.returncode == 0, one.stderr
    assert strict(tmp_path / "two.json")["psnr"] == result["psnr"]
    command("eval_fid", truth, truth, "--metrics", "psnr", "--json", tmp_path / "o.json")
    result = strict(tmp_path / "o.json")
    assert result["psnr"] is None and result["psnr_infinite"] == 3


def drawn_lpips(folder):
    """Random weights in the released files' formats -> the flags that name them."""
    import timm
    torch.manual_seed(0)
    with torch.device("meta"):
        trunk = timm.create_model("vgg16", num_classes=0).features
    drawn = {key: torch.randn(x.shape) * (2 / x[0].numel()) ** 0.5 for key, x in trunk.state_dict().items()}
    torch.save({f"features.{key}": value for key, value in drawn.items()}, folder / "vgg.pth")
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1)
             for i, width in enumerate((64, 128, 256, 512, 512))}
    torch.save(heads, folder / "heads.pth")
    return "--vgg", folder / "vgg.pth", "--lpips-heads", folder / "heads.pth"


def test_lpips_and_psnr_of_pairs(command, tmp_path):
    weights = drawn_lpips(tmp_path)
    a, b = pictures(tmp_path / "a.npz", 3, 1), pictures(tmp_path / "b.npz", 3, 2)
    metrics = ("--metrics", "lpips", "psnr", "--json", tmp_path / "o.json")
    command("eval_fid", tmp_path / "a.npz", tmp_path / "b.npz", *metrics, *weights)
    result = strict(tmp_path / "o.json")
    network = eval_fid.Lpips(eval_fid.Weights(vgg=weights[1], lpips_heads=weights[3]),
                             eval_fid.Work(0, 1, torch.device("cpu"), 1))
    x, y = (torch.from_numpy(c).permute(0, 3, 1, 2).float() / 127.5 - 1 for c in (a, b))
    with torch.inference_mode():
        assert result["lpips"] == pytest.approx(float(network(x, y).mean()), rel=1e-5) and result["lpips"] > 0
        assert network(x, x).abs().max() == 0
        recorded = [0.338318, 0.258676, 0.387254]  # when it equalled the package
        assert network(x, y).tolist() == pytest.approx(recorded, rel=1e-3)
    mse = ((a.astype(float) - b) ** 2).mean((1, 2, 3))
    assert result["psnr"] == pytest.approx((10 * np.log10(255 ** 2 / mse)).mean(), rel=1e-9)
    assert result["recipe"]["lpips"] == "v0.1 vgg" and len(result["recipe"]["heads_sha256"]) == 64
    torch.save({}, tmp_path / "heads.pth")
    with pytest.raises(InputError, match="lacks lin0.model.1.weight"):
        eval_fid.Lpips(eval_fid.Weights(vgg=weights[1], lpips_heads=weights[3]),
                       eval_fid.Work(0, 1, torch.device("cpu"), 1))


def test_pairs_that_do_not_pair(command, tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    a = folder_of(tmp_path / "a", {"x": picture, "y": picture})
    wrong = {
        "y only in one": folder_of(tmp_path / "b", {"x": picture}),
        "must be equal": folder_of(tmp_path / "c", {"x": picture, "y": picture[:4]}),
        "two pictures of one name": folder_of(tmp_path / "d", {"x": picture, "y/z": picture, "y_z": picture}),
        "statistics alone": broken(tmp_path, "pytorch_fid"),
    }
    for words, other in wrong.items():
        with pytest.raises(InputError, match=words):
            command("eval_fid", a, other, "--metrics", "psnr")
    for flags, words in ((("psnr", "fid"), "not sets"), (("lpips",), "lpips needs --vgg")):
        with pytest.raises(InputError, match=words):
            command("eval_fid", a, a, "--metrics", *flags)
    with pytest.raises(InputError, match="give REF"):
        command("eval_fid", a, "--metrics", "psnr", "--save-stats", tmp_path / "s.npz")


def test_two_files_of_one_stem_are_two_pictures_of_a_set(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(tmp_path / "a.jpg")
    white, black = eval_fid.open_source(tmp_path).read(range(2))
    assert white.min() == 255 and black.max() == 0


def test_a_metric_is_one_function_and_its_row(command, tmp_path, monkeypatch):
    def gap(samples, reference):
        return {"gap": float((samples.mean(0) - reference.mean(0)).norm()), "gap_number": len(samples)}

    monkeypatch.setitem(eval_fid.METRICS, "gap", eval_fid.Metric("vae", ("features", "latent"), gap))
    pictures(tmp_path / "a.npz", 5, 1, 64), pictures(tmp_path / "b.npz", 4, 2, 64)
    command("eval_fid", tmp_path / "a.npz", tmp_path / "b.npz", "--metrics", "gap",
            "--json", tmp_path / "o.json")
    result = strict(tmp_path / "o.json")
    assert result["gap"] > 0 and result["gap_number"] == 5 and result["rank_deficient"] is False


# ------------------------------------------------------------------------------------------------
# Told before any picture is read.

@pytest.fixture
def small(monkeypatch, tmp_path):
    """Files of three and six pictures; the metrics of features look through the toy autoencoder."""
    for metric in ("precision", "recall", "kid"):
        row = eval_fid.METRICS[metric]._replace(network="vae", takes=("features", "latent"))
        monkeypatch.setitem(eval_fid.METRICS, metric, row)
    pictures(tmp_path / "3.npz", 3, 1), pictures(tmp_path / "6.npz", 6, 2)
    return tmp_path / "3.npz", tmp_path / "6.npz"


class TwoOutputs:
    """The mean colour of a picture, and its double."""

    keys, id = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}, {}

    def __call__(self, pictures):
        x = torch.tensor(np.stack([picture.mean((0, 1)) for picture in pictures]), dtype=torch.float32)
        return {"pool": x, "spatial": 2 * x}


def test_pictures_are_looked_at_for_the_moments_that_their_file_lacks(small):
    source = eval_fid.open_source(small[0])
    stored = {"mu": np.ones(3), "sigma": np.eye(3)}
    work = eval_fid.Work(0, 1, torch.device("cpu"), 8)
    both = {("moments", "pool"), ("moments", "spatial")}
    for held, known in ((stored, stored["mu"]), ({}, None)):
        side = eval_fid.study(source._replace(statistics=held), TwoOutputs(), both, work)
        pool, spatial = (side.known["moments", name][0] for name in ("pool", "spatial"))
        seen = np.stack([np.asarray(image).mean((0, 1)) for image in source.read(range(3))]).mean(0)
        assert np.allclose(pool, seen if known is None else known) and np.allclose(spatial, 2 * seen)
    alone = eval_fid.study(source._replace(statistics=stored), TwoOutputs(), {("moments", "pool")}, work)
    assert alone.pictures is None  # nothing is looked at for what is there


def unread(monkeypatch):
    """From now on a picture that is read is an error."""
    def read(self, rows):
        raise AssertionError("a picture was read")
    monkeypatch.setattr(eval_fid.Source, "read", read)


def test_a_metric_of_more_pictures_is_left_out_and_the_others_are_computed(small, command, tmp_path):
    three, six = small
    assert {metric: row.least for metric, row in eval_fid.METRICS.items() if row.least > 1} == {
        "precision": 4, "recall": 4, "kid": 1000}
    both = ["precision", "recall"]
    for pair, metrics, left in (((six, six), ["kid", "latent-fd"], ["kid"]),
                                ((three, six), [*both, "latent-fd"], both),
                                ((six, six), ["precision", "kid", "recall"], ["kid"])):
        out = command("eval_fid", *pair, "--metrics", *metrics, "--json", tmp_path / "o.json")
        result = strict(tmp_path / "o.json")
        names = [metric.replace("-", "_") for metric in metrics]
        assert [name for name in names if result[name] is None] == left and len(left) < len(names)
        for name in left:
            needed = eval_fid.METRICS[name].least
            assert f"{name}: left out, needs {needed} pictures, {pair[0]} has" in out
        assert out.index("left out") < out.index(names[-1] + " ")
        assert result["recipe"]["metrics"] == metrics


def test_where_no_metric_remains_no_picture_is_read(small, command, monkeypatch, tmp_path):
    three, six = small
    command("eval_fid", six, "--metrics", "latent-fd", "--save-stats", tmp_path / "s.npz")
    unread(monkeypatch)
    saved, both = tmp_path / "s.npz", ("precision", "recall")
    for pair, metrics, words in (((three, six), both, f"{three} has 3; recall: left out"),
                                 ((six, three), ["kid"], "kid: left out, needs 1000 pictures, .*6.npz has"),
                                 ((six, saved), ["recall"], "s.npz is statistics alone"),
                                 ((saved, six), ["is"], "s.npz is statistics alone"),
                                 ((six, saved), ["fid"], "s.npz is statistics alone, without moments of")):
        with pytest.raises(InputError, match=words):
            command("eval_fid", *pair, "--metrics", *metrics, "--json", tmp_path / "o.json")
    assert not (tmp_path / "o.json").exists()


def test_no_file_that_is_read_is_written(small, command, monkeypatch, tmp_path):
    three, six = small
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"0")
    (tmp_path / "link.npz").symlink_to(six)
    os.link(weights, tmp_path / "twin")
    before = {path: path.read_bytes() for path in (three, six, weights)}
    unread(monkeypatch)
    files = ("--inception", weights, "--dinov2", weights, "--vgg", weights, "--lpips-heads", weights)
    for flags in (("--json", three), ("--save-stats", six), ("--json", tmp_path / "link.npz"),
                  ("--json", tmp_path / "x/../6.npz"), ("--save-stats", weights, *files[:2]),
                  ("--json", tmp_path / "twin", *files[2:4]), ("--json", weights, *files[4:6]),
                  ("--json", weights, *files[6:]), ("--json", weights, "--vae", weights)):
        with pytest.raises(InputError, match=f"{flags[1]}: would be overwritten"):
            command("eval_fid", three, six, "--metrics", "latent-fd", *flags)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems hold UTF-8 names alone")
def test_names_that_are_not_utf8_and_numbers_that_are_none(command, tmp_path, monkeypatch):
    picture = np.zeros((8, 8, 3), np.uint8)
    a = folder_of(tmp_path / "a", {"n01/x": picture, os.fsdecode(b"n01/caf\xe9"): picture})
    b = folder_of(tmp_path / "b", {"x": picture, "y": picture})
    odd = folder_of(tmp_path / os.fsdecode(b"odd\xff"), {"x": picture})
    plain = folder_of(tmp_path / "c", {"x": picture})
    command("eval_fid", a, b, "--metrics", "latent-fd", "--json", tmp_path / "o.json")
    recipe = strict(tmp_path / "o.json")["recipe"]
    assert recipe["samples"]["count"] == 2
    source = eval_fid.open_source(odd)
    assert json.loads(json.dumps(eval_fid.describe(source, 1)).encode())["name"] == odd.name
    size = (plain / "x.png").stat().st_size
    (plain / "notes.txt").write_text("no picture")
    listed = hashlib.sha256(f"x.png {size}\n".encode()).hexdigest()
    assert eval_fid.describe(eval_fid.open_source(plain), 1)["sha256"] == listed
    row = eval_fid.METRICS["latent-fd"]._replace(compute=lambda *moments: {"d": math.nan, "e": math.inf})
    monkeypatch.setitem(eval_fid.METRICS, "latent-fd", row)
    (a / "meta.json").write_text('{"checkpoint_sha256": "0", "cfg": NaN, "steps": [Infinity, 2]}')
    command("eval_fid", a, b, "--metrics", "latent-fd", "--json", tmp_path / "o.json")
    result = strict(tmp_path / "o.json")
    assert result["d"] is None and result["e"] is None
    made = result["recipe"]["samples"]["sampling"]
    assert made["cfg"] is None and made["steps"] == [None, 2]


def test_wrapped_and_older_weights_load(tmp_path):
    layer = torch.nn.Linear(2, 3)
    state = {f"module.net.{key}": value for key, value in layer.state_dict().items()}
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    loaded = eval_fid._load(torch.nn.Linear(2, 3), tmp_path / "w.pth", "get it", "net.")
    assert torch.equal(loaded.weight, layer.weight)


# ------------------------------------------------------------------------------------------------
# Bad input.

def broken(tmp_path, name):
    path = tmp_path / f"{name}.npz"
    good = dict(mu=np.zeros(2048), sigma=np.eye(2048))
    if name == "nan":
        np.savez(path, mu=np.full(2048, np.nan), sigma=np.eye(2048))
    elif name == "shapes":
        np.savez(path, mu=np.zeros(2048), sigma=np.eye(2047))
    elif name == "dimensions":
        np.savez(path, mu=np.zeros(768), sigma=np.eye(768), mu_s=np.zeros(7), sigma_s=np.eye(7))
    elif name == "pytorch_fid":
        np.savez(path, **good)
    elif name == "mode":
        np.savez(path, **good, mu_s=np.zeros(2023), sigma_s=np.eye(2023), preprocess="pytorch_fid")
    elif name == "weights":
        np.savez(path, **good, mu_s=np.zeros(2023), sigma_s=np.eye(2023), inception_sha256="0" * 64)
    elif name == "float":
        np.savez(path, arr_0=np.zeros((4, 8, 8, 3), np.float32))
    elif name == "nothing":
        np.savez(path, images=np.zeros(3))
    elif name == "pickle":
        np.savez(path, mu=np.array([{}], object), sigma=np.eye(1))
    elif name == "empty":
        path = tmp_path / "empty"
        path.mkdir()
    elif name == "variance":
        np.savez(path, mu=np.zeros(2048), sigma=-np.eye(2048))
    elif name == "strings":
        np.savez(path, mu=np.array(["a"]), sigma=np.eye(1))
    elif name == "latent":
        np.savez(path, mu_latent=np.zeros(4), sigma_latent=np.eye(4))
    elif name == "unfinished":
        path = tmp_path / "unfinished"
        (path / "rgb").mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path / "rgb" / "0.png")
        (path / "meta.json").write_text(json.dumps({"checkpoint_sha256": "0", "complete": False}))
    elif name == "text":
        path.write_text("hello")
    return path


@pytest.mark.parametrize("name, words", (
    ("nan", "not finite"), ("shapes", "do not belong together"), ("dimensions", "768 dimensions"),
    ("pytorch_fid", "never mix"), ("mode", "never mix"), ("weights", "never mix"),
    ("float", "expected uint8"), ("nothing", "expected arr_0"), ("pickle", "not readable"),
    ("empty", "no pictures"), ("variance", "negative variances"), ("strings", "expected floats"),
    ("latent", "give pictures"), ("unfinished", "not complete"), ("text", "not readable"),
    ("absent", "no such file")))
def test_bad_references(command, inception, tmp_path, name, words):
    pictures(tmp_path / "a.npz", 4, 1)
    path = broken(tmp_path, name)
    with pytest.raises(InputError, match=words) as error:
        command("eval_fid", tmp_path / "a.npz", path, "--inception", inception, "--metrics", "fid",
                "--json", tmp_path / "o.json")
    assert str(path) in str(error.value) and not (tmp_path / "o.json").exists()


def test_features_that_are_not_finite_name_the_picture(command, tmp_path):
    state = drawn_inception()
    state["Mixed_7c.branch1x1.bn.weight"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    pictures(tmp_path / "a.npz", 4, 1)
    with pytest.raises(InputError, match="picture 0 gives pool features that are not finite"):
        command("eval_fid", tmp_path / "a.npz", tmp_path / "a.npz", "--inception", tmp_path / "nan.pth")
    torch.save({k: v for k, v in state.items() if "fc" not in k}, tmp_path / "short.pth")
    with pytest.raises(InputError, match="lacks fc.weight"):
        command("eval_fid", tmp_path / "a.npz", tmp_path / "a.npz", "--inception", tmp_path / "short.pth")


def test_cut_array_is_named(command, inception, tmp_path):
    import io
    import zipfile
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as file:
        file.writestr("arr_0.npy", buffer.getvalue()[:-100])
    with pytest.raises(InputError, match="cut short at picture 3 of 4"):
        command("eval_fid", tmp_path / "cut.npz", tmp_path / "cut.npz", "--inception", inception)


# ------------------------------------------------------------------------------------------------
# The reference packages.

def test_inception_equals_pytorch_fid(inception, monkeypatch, figure):
    module = pytest.importorskip("pytorch_fid.inception")
    released = torch.load(inception, weights_only=True)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *a, **k: released)
    theirs, ours = module.InceptionV3().eval(), eval_fid.Inception().eval()
    ours.load_state_dict(torch.load(inception, weights_only=True))
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        a, b = theirs(x)[0].flatten(1), ours(eval_fid.PREPROCESS["pytorch_fid"](x * 255))["pool"]
    figure("pytorch-fid pool_3, random weights: largest difference, largest value",
           [float((a - b).abs().max()), float(a.abs().max())])
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_frechet_equals_pytorch_fid(figure):
    module = pytest.importorskip("pytorch_fid.fid_score")
    rng = np.random.default_rng(0)
    a = rng.standard_normal((500, 100))
    b = rng.standard_normal((500, 100)) @ rng.standard_normal((100, 100)) / 10
    moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in (a, b)]
    try:
        theirs = module.calculate_frechet_distance(*moments[0], *moments[1])
    except TypeError:
        pytest.skip("this release calls scipy's sqrtm in a way that the installed scipy no longer has")
    ours = eval_fid.frechet(*(torch.from_numpy(m) for pair in moments for m in pair))
    figure("pytorch-fid Frechet distance of 500x100 features: theirs, ours", [float(theirs), ours])
    assert ours == pytest.approx(theirs, rel=1e-7)


def test_inception_equals_torch_fidelity(inception, figure):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    theirs = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"],
                                                feature_extractor_weights_path=str(inception))
    ours = eval_fid.Inception().eval()
    ours.load_state_dict(torch.load(inception, weights_only=True))
    for size in (64, 256):
        x = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
        seen = []
        branch = theirs.Mixed_6d.branch1x1
        hook = branch.register_forward_hook(lambda module, given, out, seen=seen: seen.append(out))
        with torch.inference_mode():
            pool, logits = theirs(x)
            hook.remove()
            spatial = seen[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
            mine = ours(eval_fid.PREPROCESS["adm"](x.float()))
        pairs = ((pool, mine["pool"]), (logits, mine["logits"]), (spatial, mine["spatial"]))
        gaps = [float((a - b).abs().max() / a.abs().max()) for a, b in pairs]
        figure(f"torch-fidelity pool_3, logits, Mixed_6d.branch1x1 at {size} px, random weights: "
               "largest relative differences", gaps)
        assert spatial.shape == (2, 2023)
        assert max(gaps) <= 1e-5


def test_metrics_equal_torch_fidelity(figure):
    prc, kid = (pytest.importorskip(f"torch_fidelity.metric_{m}") for m in ("prc", "kid"))
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(1200, 64, generator=g), torch.randn(1100, 64, generator=g) * 1.1 + 0.1
    theirs = prc.prc_features_to_metric(a, b, prc_neighborhood=3, prc_batch_size=500, save_cpu_ram=True,
                                        verbose=False)
    theirs = theirs["precision"], theirs["recall"]
    ours = eval_fid.precision_recall(a, b)
    assert ours == pytest.approx(theirs, abs=2e-3)  # distances through cdist, not squared
    theirs_kid = kid.kid_features_to_metric(a.double(), b.double(), verbose=False)
    ours_kid = eval_fid.kernel_distance(a, b)
    assert tuple(ours_kid.values()) == pytest.approx(tuple(theirs_kid.values()), rel=1e-6)
    figure("torch-fidelity precision, recall of 1200 and 1100 features: theirs, ours",
           [list(theirs), list(ours)])
    figure("torch-fidelity KID: theirs, ours", [float(next(iter(theirs_kid.values()))), ours_kid["kid"]])


def test_lpips_equals_the_package(tmp_path, figure):
    lpips, torchvision = pytest.importorskip("lpips"), pytest.importorskip("torchvision")
    torch.manual_seed(0)
    trunk = torchvision.models.vgg16(weights=None)
    torch.save(trunk.state_dict(), tmp_path / "vgg.pth")
    import pathlib
    heads = pathlib.Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    slices = (getattr(theirs.net, f"slice{i}") for i in range(1, 6))
    for module in slices:
        for name, layer in module.named_children():
            layer.load_state_dict(trunk.features[int(name)].state_dict())
    ours = eval_fid.Lpips(eval_fid.Weights(vgg=tmp_path / "vgg.pth", lpips_heads=heads),
                          eval_fid.Work(0, 1, torch.device("cpu"), 1))
    a, b = (torch.rand(3, 3, 64, 64) * 2 - 1 for _ in range(2))
    with torch.inference_mode():
        want, got = theirs(a, b).flatten(), ours(a, b)
        assert ours(a, a).abs().max() == 0
    figure("lpips VGG, random trunk, released heads: theirs, ours", [want.tolist(), got.tolist()])
    assert (want - got).abs().max() <= 1e-5 * want.abs().max()
