"""Muon, the learning rates' schedule, the times, recipes: what makes a step learn more."""
import copy
import json

import pytest
import torch

import mix
import train
from conftest import TRAIN, gap
from distributed import InputError, command_parser, with_row
from mix import draws_of
from model import build_model
from optimisers import OPTIMISERS, orthogonal, schedule, set_rates, update, update_ema
from small import SMALL
from weights import load_checkpoint

RATES = {"lr": 1e-3, "muon_lr": 0.02}
FOUR = ("rgb", "depth", "normal", "seg")


# ------------------------------------------------------------------------------------------------
# The optimisers.

@pytest.mark.parametrize("m, n", ((48, 48), (192, 48), (48, 192)))
def test_singular_values_become_about_one(m, n):
    """Over two orders of magnitude, for several matrices at once; the singular vectors stay."""
    k, g = min(m, n), torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(3, size, k, generator=g))[0] for size in (m, n))
    x = orthogonal(u * torch.logspace(-4, -2, k) @ v.mT, torch.float32)
    values = torch.linalg.svdvals(x)
    assert x.shape == (3, m, n) and 0.67 < values.min() and values.max() < 1.21
    turned = u.mT @ x @ v
    assert (turned - turned.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 1e-3
    rough = orthogonal(u * torch.logspace(-4, -2, k) @ v.mT, torch.bfloat16)
    assert rough.dtype == torch.float32 and (rough - x).abs().max() < 0.1


def stepping(name):
    """A drawn network of two blocks with its optimiser -> model, parameters, optimiser."""
    model, g = build_model(SMALL, latent_size=8, projector=False), torch.Generator().manual_seed(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.04)
    optimiser = OPTIMISERS[name](parameters, model.blocks, 0.999, "fp32")
    set_rates(optimiser, RATES, 1.0)
    return model, parameters, optimiser


def give_gradients(parameters, seed=0, bad=False):
    g = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=g)
    if bad:
        parameters[0].grad.view(-1)[0] = float("inf")


def test_muon_moves_the_blocks_matrices_by_orthogonal_ones():
    """Queries, keys and values by themselves, tall ones further; all else moves as with AdamW alone."""
    (model, parameters, muon), (other, theirs, adamw) = stepping("muon"), stepping("adamw")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    give_gradients(parameters), give_gradients(theirs)
    norms = [update(p, optimiser)[0] for p, optimiser in ((parameters, muon), (theirs, adamw))]
    assert norms[0] == norms[1]
    after, beside = dict(model.named_parameters()), dict(other.named_parameters())
    matrices = {f"blocks.{i}.{name}.weight" for i in (0, 1)
                for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    for name in sorted(after.keys() - matrices):
        assert torch.equal(after[name], beside[name]), name
    for name in sorted(matrices):
        for part in (before[name] - after[name]).chunk(3 if "qkv" in name else 1):
            size = 0.02 * (2 if "fc1" in name else 1)  # fc1 has four times as many rows as columns
            values = torch.linalg.svdvals(part) / size
            assert 0.6 < values.quantile(0.1) and values.max() < 1.21, name


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_step_is_of_the_betas_and_the_clipped_gradient(name):
    model, parameters, _ = stepping(name)
    optimiser = OPTIMISERS[name](parameters, model.blocks, 0.95, "fp32")
    group = optimiser.param_groups[0]
    assert group["betas"] == (0.9, 0.95) and group["weight_decay"] == 0
    give_gradients(parameters)
    norm, _ = update(parameters, optimiser)
    kept = optimiser.state[parameters[0]]["exp_avg"]
    give_gradients(parameters)
    assert norm > 10 and torch.allclose(kept, 0.1 * parameters[0].grad / norm, rtol=1e-4)


def test_the_averages_rate_ends_at_9999():
    model = stepping("adamw")[0]
    ema = copy.deepcopy(model).requires_grad_(False)
    for p in ema.parameters():
        p.zero_()
    update_ema(ema, model, 10 ** 6)
    assert torch.allclose(ema.heads[0].linear.weight, 1e-4 * model.heads[0].linear.weight, rtol=1e-3)


def contents(state):
    """All tensors of an optimiser's state_dict, in order."""
    if isinstance(state, torch.Tensor):
        return [state.clone()]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [x for part in inner for x in contents(part)]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_non_finite_gradient_leaves_weights_and_state(name):
    _, parameters, optimiser = stepping(name)
    give_gradients(parameters)
    update(parameters, optimiser)
    kept, state = [p.detach().clone() for p in parameters], contents(optimiser.state_dict())
    assert len(state) >= len(parameters)
    give_gradients(parameters, 1, bad=True)
    assert update(parameters, optimiser)[1] == 1
    again = contents(optimiser.state_dict())
    assert all(map(torch.equal, kept, parameters)) and all(map(torch.equal, state, again))
    give_gradients(parameters, 2)
    assert update(parameters, optimiser)[1] == 0
    assert not any(map(torch.equal, kept, parameters))


def test_a_parameter_without_a_gradient_stays():
    model, parameters, optimiser = stepping("muon")
    give_gradients(parameters)
    weight = model.blocks[0].mlp.fc1.weight
    kept, weight.grad = weight.detach().clone(), None
    update(parameters, optimiser)
    assert torch.equal(kept, weight)


# ------------------------------------------------------------------------------------------------
# The learning rates.

def test_the_rates_rise_stay_and_fall():
    assert [schedule(step) for step in (0, 10 ** 6)] == [1.0, 1.0]
    assert [schedule(step, warmup=4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    falling = [schedule(step, 0, 10, 14) for step in (0, 10, 11, 13, 14, 99)]
    assert falling == [1.0, 1.0, 0.75, 0.25, 0.0, 0.0]


# ------------------------------------------------------------------------------------------------
# The times.

def times(name, size=1, rows=20_000):
    """The Draws of a step of latents of this size."""
    return draws_of(0, 3, "mmgen", FOUR, torch.ones(rows, 4), (rows, 16, size, size), name)


def quantiles(t):
    return torch.quantile(t, torch.tensor([0.25, 0.5, 0.75])).tolist()


def test_times_are_distributed_as_their_names_say():
    """Draws but t are those of uniform; a condition's t stays in [0.99, 1]."""
    plain = times("uniform")
    role, free = torch.arange(20_000) % 4, ~plain.given
    first, last = free & (role < 3)[:, None], free & (role == 3)[:, None]
    expected = {"uniform": (0.25, 0.5, 0.75), "early": (1 / 7, 1 / 3, 0.6),
                "lognormal": (0.3375, 0.5, 0.6625)}
    for name, quarters in expected.items():
        d = times(name)
        assert quantiles(d.t[first]) == pytest.approx(quarters, abs=0.015), name
        assert quantiles(d.t[last]) == pytest.approx(quarters, abs=0.03), name
        assert torch.equal(d.t[d.given], plain.t[plain.given])
        assert all(torch.equal(a, b) for a, b in zip(d[1:], plain[1:]))
    given = times("early-given")
    assert torch.equal(given.t[first], plain.t[first])
    assert torch.equal(given.t[last], times("early").t[last])


def test_shifted_times_follow_the_latents():
    """Uniform at 4,096 dimensions; XL/2's four modalities of 32x32 are shifted as "early" is."""
    u = torch.rand(1000)
    assert torch.equal(mix.shifted(u, 4096), u / (u + (1 - u)))
    assert torch.equal(mix.shifted(u, 16_384), mix.early(u, 1))
    small, large = times("shifted", 16, 8), times("shifted", 32, 8)
    assert torch.allclose(small.t, times("uniform", 16, 8).t, atol=1e-6)
    assert torch.allclose(large.t, times("early", 32, 8).t, atol=1e-6)


def test_all_times_lie_between_noise_and_data():
    u = torch.tensor([0.0, 2.0 ** -24, 0.5, 1 - 2.0 ** -24])
    for both in mix.TIMES.values():
        for function in both:
            t = function(u, 4096)
            assert (t >= 0).all() and (t <= 1).all() and (t.diff() > 0).all()


def test_uniform_times_have_the_bits_of_before():
    """Recorded before there were others."""
    t = draws_of(0, 5, "independent-t", FOUR, torch.ones(8, 4), (8, 16, 2, 2)).t
    assert t[0].tolist() == [0.8302518725395203] * 4
    assert t[3].tolist() == [0.6697648167610168, 0.2614731192588806, 0.04071521759033203, 0.7850357890129089]


# ------------------------------------------------------------------------------------------------
# The command.

def test_a_run_with_all_of_it_resumes_to_the_same_bits(cache, tmp_path, command):
    """Muon, warm-up, decay, REPA's end and times: 4 steps = 2 steps + resume, a recipe = its flags."""
    shared = ("--data", cache, "--model", SMALL, "--batch-size", 4, "--preview-every", 1000, "--log-every", 1,
              "--warmup", 2, "--decay-from", 1, "--decay-to", 5, "--repa-until", 3, "--beta2", 0.95)
    row = train.RECIPES["better"].split()
    command("train", *shared, "--recipe", "better", "--steps", 4, "--run", tmp_path / "whole")
    command("train", *shared, "--recipe", "better", "--steps", 2, "--run", tmp_path / "half")
    with pytest.raises(InputError, match="was trained with .* = "):
        command("train", *shared, "--steps", 4, "--run", tmp_path / "half")
    out = command("train", *shared, *row, "--steps", 4, "--run", tmp_path / "half", "--muon-lr", 0.02)
    assert "lr 0.0001, muon_lr 0.02" in out
    assert gap(tmp_path / "whole", tmp_path / "half") == 0
    whole, half = (load_checkpoint(tmp_path / name) for name in ("whole", "half"))
    ours, theirs = contents(whole["opt"]), contents(half["opt"])
    assert len(ours) == len(theirs) > 50 and all(map(torch.equal, ours, theirs))
    log = [json.loads(line) for line in (tmp_path / "half/log.jsonl").read_text().splitlines()]
    assert [entry["lr"] for entry in log] == [1e-4 * x for x in (0.5, 1, 0.75, 0.5)]
    assert [entry["muon_lr"] for entry in log] == [0.02 * x for x in (0.5, 1, 0.75, 0.5)]
    kept = half["config"]["train"]
    assert (kept["optimiser"], kept["recipe"]) == ("muon", None)


def test_blocks_are_those_of_the_file_that_a_run_begins_with(cache, tmp_path, command):
    """Else half of --init's weights would be left out; a resume takes its own."""
    flags = ("--data", cache, "--model", SMALL, "--batch-size", 4, "--preview-every", 1000,
             "--repa-weight", 0)
    command("train", *flags, "--run", tmp_path / "a", "--steps", 1, "--blocks", "modern")
    command("train", *flags, "--run", tmp_path / "b", "--steps", 1, "--init", tmp_path / "a")
    command("train", *flags, "--run", tmp_path / "b", "--steps", 2)
    for name in "ab":
        config = load_checkpoint(tmp_path / name)["config"]
        assert config["model"]["blocks"] == config["train"]["blocks"] == "modern"
    assert load_checkpoint(tmp_path / "b")["step"] == 2
    with pytest.raises(InputError, match="its blocks are modern, .* pass --blocks modern"):
        command("train", *flags, "--run", tmp_path / "c", "--steps", 1, "--init", tmp_path / "a",
                "--blocks", "sit")


def test_without_repas_weight_the_projector_stays(cache, tmp_path, command):
    """From --repa-until on; its loss is still told."""
    command("train", "--data", cache, "--run", tmp_path, "--model", SMALL, "--batch-size", 4, "--steps", 2,
            "--ckpt-every", 1, "--log-every", 1, "--preview-every", 1000, "--repa-until", 0)
    one, two = (load_checkpoint(tmp_path / f"ckpt/000000{step}.pt")["model"] for step in (1, 2))
    equal = {name: torch.equal(one[name], two[name]) for name in one}
    assert all(equal[name] for name in one if name.startswith("projector"))
    assert not equal["heads.0.linear.weight"]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(entry["loss_repa"] != 0 for entry in log)


@pytest.mark.parametrize("change, message", (
    (("--muon-lr", "0"), r"--muon-lr 0.0: must lie in \[1e-12, 1000\]"),
    (("--beta2", "1"), r"--beta2 1.0: must lie in \[0, 0.99999\]"),
    (("--warmup", "-1"), "--warmup -1: must be at least 0"),
    (("--repa-until", "-1"), "--repa-until -1: must be at least 0"),
    (("--decay-from", "5"), "--decay-from 5 --decay-to None: two steps"),
    (("--decay-from", "5", "--decay-to", "5"), "--decay-from 5 --decay-to 5: two steps"),
))
def test_flags_of_no_use_are_refused(change, message, cache, tmp_path, command):
    with pytest.raises(InputError, match=message):
        command("train", "--data", cache, "--run", tmp_path, "--model", SMALL, *change)


def test_an_optimiser_is_the_runs_own(cache, trained, command):
    for change, message in ((("--optimiser", "muon"), "optimiser = adamw, this command has muon"),
                            (("--times", "early"), "times = uniform, this command has early"),
                            (("--recipe", "better"), "blocks = sit, this command has modern")):
        with pytest.raises(InputError, match=f"was trained with {message}"):
            command("train", "--data", cache, "--run", trained, *TRAIN, *change)


def test_a_recipe_stands_before_the_users_own_flags():
    rows = {"a": "--steps 3 --lr 1"}
    words = ["--lr", "2", "--recipe", "a"]
    assert with_row(words, "--recipe", rows) == ["--steps", "3", "--lr", "1", *words]
    assert with_row(["--lr", "2"], "--recipe", rows) == ["--lr", "2"]
    assert with_row(["--recipe", "b"], "--recipe", rows) == ["--recipe", "b"]
    parser = command_parser("")
    train.add_flags(parser)
    train.MMGen.add_flags(parser)
    for words in train.RECIPES.values():
        parser.parse_args(words.split())
    assert train.RECIPES["paper"] == ""
