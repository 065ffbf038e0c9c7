"""model.py: the network."""
import json
import re

import pytest
import torch
import torch.nn as nn
from conftest import ROOT

from distributed import InputError
from layers import BLOCKS, rotate, rotation_of
from model import FUSIONS, SIZES, Fusion, build_model, sincos_positions
from small import SMALL
from transfer import parts_of


def random_model(size="T/2", **options):
    torch.manual_seed(0)
    model = build_model(size, num_classes=5, latent_size=8, **options)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.04)
    return model.eval()


def inputs(n=3, channels=16, size=(8, 8), M=4):
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(n, channels, *size, generator=g), torch.rand(n, M, generator=g)
    return x, t, torch.arange(n), torch.zeros(n, M, dtype=torch.bool)


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        for projector, count in ((True, 694_647_936), (False, 686_516_608)):
            assert sum(p.numel() for p in build_model("XL/2", projector=projector).parameters()) == count


def test_a_fresh_model_outputs_zero():
    model = build_model("T/2", num_classes=5, latent_size=8)
    v, z = model(*inputs())
    assert v.shape == (3, 16, 8, 8) and z.shape == (3, 16, 768) and v.abs().max() == 0


def test_initial_weights_are_distributed_as_the_released_codes():
    """Standard deviation and largest size of each weight of a fresh B/2 of theirs, as recorded: 0 where it
    starts at zero; a uniform weight ends at 1.73 deviations, a normal one far beyond.
    """
    recorded = json.loads((ROOT / "tests/released_init.json").read_text())
    weights = build_model("B/2").state_dict()
    kinds = {re.sub(r"(blocks|heads)\.\d+\.", r"\1.", name) for name in weights}
    assert kinds == {re.sub(r"(blocks|heads)\.\d+\.", r"\1.", name) for name in recorded}
    for name, (deviation, largest) in recorded.items():
        weight = weights[name]
        assert weight.std(unbiased=False).item() == pytest.approx(deviation, rel=0.04), name
        assert (weight.abs().max() < 2 * weight.std()) == (largest < 2 * deviation), name


def test_a_fusion_of_ones_own(monkeypatch):
    """What it starts with is its own affair; which weights are of a modality is seen."""
    class Own(Fusion):
        def __init__(self, num_modalities, channels, patch, width):
            super().__init__(num_modalities)
            self.parts = nn.ModuleList(nn.Conv2d(channels, width, patch, patch, bias=False)
                                       for _ in range(num_modalities))
            self.gate = nn.Linear(width, 1)
            self.rows = nn.Linear(2, num_modalities + 1)  # the first, or the last, is of none
            self.down = nn.Linear(2 * num_modalities, 2, bias=False)
            self.square = nn.Linear(num_modalities, num_modalities, bias=False)
            self.four = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))  # whatever their number

        def initialise(self):
            nn.init.zeros_(self.gate.weight)

    monkeypatch.setitem(FUSIONS, "own", Own)
    model = build_model(SMALL, fusion="own")
    assert not model.x_embedder.gate.weight.any() and model.x_embedder.parts[0].weight.any()
    joined, lists = parts_of(model.config)
    assert lists == ["heads", "x_embedder.parts"]
    unseen = dict.fromkeys(("x_embedder.rows.weight", "x_embedder.rows.bias", "x_embedder.square.weight"))
    assert joined == {**unseen, "x_embedder.down.weight": (1, 0), "task_embedder.weight": (0, 1),
                      "t_embedder.mlp_fused.0.weight": (1, 0)}

    class Odd(Own):
        def __init__(self, num_modalities, *sizes):
            super().__init__(num_modalities, *sizes)
            setattr(self, f"of{num_modalities}", nn.Linear(2, 2, bias=False))

    class Nested(Own):
        def __init__(self, num_modalities, *sizes):
            super().__init__(num_modalities, *sizes)
            self.pairs = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(num_modalities))
                                       for _ in range(num_modalities))

    class Four(Own):
        def __init__(self, num_modalities, *sizes):
            if num_modalities != 4:
                raise ValueError("four")
            super().__init__(num_modalities, *sizes)

    for fusion, message in ((Odd, r"of\d.weight is not there with any"), (Nested, "pairs.0.*within one"),
                            (Four, r"cannot be built with 5 modalities \(four\)")):
        monkeypatch.setitem(FUSIONS, "own", fusion)
        with pytest.raises(InputError, match=message):
            parts_of(model.config)


def test_a_time_mlp_that_is_not_fused_embeds_to_the_width():
    model = random_model(modalities=["rgb"], fused_time=False, task_embedding=False)
    names = {name: tuple(p.shape) for name, p in model.t_embedder.named_parameters()}
    assert names["mlp.2.weight"] == (192, 192) and not any("fused" in name for name in names)
    x, t, y, given = inputs(channels=4, M=1)
    assert (model(x, t, y, given)[0] - model(x, 1 - t, y, given)[0]).abs().max() > 1e-4


@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_fusions(fusion):
    model = random_model(fusion=fusion)
    v, z = model(*inputs())
    assert v.shape == (3, 16, 8, 8) and z.shape == (3, 16, 768) and v.std() > 0.01


@pytest.mark.parametrize("blocks", list(BLOCKS))
def test_blocks_compile_whole(blocks):
    """As --compile does, without the code generator: no graph breaks, nothing changes, both ways."""
    results = []
    for compiled in (False, True):
        model = random_model(SMALL, blocks=blocks)
        for block in model.blocks if compiled else ():
            block.compile(fullgraph=True, backend="aot_eager")
        v, z = model(*inputs())
        (v.square().mean() + z.mean()).backward()
        results.append([v, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results))


@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_blocks_are_given_contiguous_tokens(fusion):
    """Compiled for AVX-512 they make NaN of transposed ones in bf16 (torch 2.11 to 2.14)."""
    model, seen = random_model(SMALL, fusion=fusion), []
    model.blocks[0].register_forward_hook(lambda m, a, o: seen.append(a[0].is_contiguous()))
    model(*inputs())
    assert seen == [True]


def test_task_embedding_is_row_0_or_the_sum_of_the_given_rows():
    model = random_model()
    x, t, y, given = inputs()
    table = model.task_embedder.weight
    c = {}
    model.blocks[0].register_forward_hook(lambda m, a, o: c.update(c=a[1]))
    model(x, t, y, given)
    base = c["c"] - table[0]
    given = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    model(x, t, y, given)
    expected = base + torch.stack([table[1], table[2] + table[3], table[0]])
    assert torch.allclose(c["c"], expected, atol=1e-6)


def test_every_modality_has_its_own_time():
    model = random_model()
    x, t, y, given = inputs()
    v = model(x, t, y, given)[0]
    for m in range(4):
        other = t.clone()
        other[:, m] = 1 - other[:, m]
        assert (model(x, other, y, given)[0] - v).abs().max() > 1e-4


def test_rectangular_latents_interpolate_positions():
    model = random_model()
    v, _ = model(*inputs(size=(8, 12)))
    assert v.shape == (3, 16, 8, 12) and torch.isfinite(v).all()


def test_positions_are_dits():
    """The first half of a row is for the column, the second for the row, each a sine and a cosine part."""
    table = sincos_positions(16, 3, 5).reshape(3, 5, 16)
    omega = 1 / 10000 ** (torch.arange(4, dtype=torch.float64) / 4)
    column = torch.cat([(4 * omega).sin(), (4 * omega).cos()])
    row = torch.cat([(2 * omega).sin(), (2 * omega).cos()])
    assert torch.allclose(table[2, 4], torch.cat([column, row])) and table.dtype == torch.float64


def test_what_cannot_be_built_is_refused():
    with pytest.raises(KeyError):
        build_model("M/2")
    with pytest.raises(KeyError):
        build_model("T/2", fusion="sum")
    with pytest.raises(ValueError, match="latent size 7x8"):
        build_model("T/2", latent_size=(7, 8))


# ------------------------------------------------------------------------------------------------
# Options beside the paper's.

def test_modern_blocks_have_as_many_weights():
    for _, width, heads, _ in SIZES.values():
        with torch.device("meta"):
            pair = BLOCKS["sit"](width, heads), BLOCKS["modern"](width, heads)
        sit, modern = (sum(p.numel() for p in block.parameters()) for block in pair)
        assert abs(modern / sit - 1) < 0.002 and width // heads % 4 == 0


def test_a_fresh_model_of_all_options_outputs_zero():
    model = build_model(SMALL, num_classes=5, latent_size=8, blocks="modern", middle_heads=True)
    v, _, v_mid = model(*inputs(), middle=True)
    assert v.shape == v_mid.shape == (3, 16, 8, 8) and v.abs().max() == v_mid.abs().max() == 0


def test_rotary_positions_are_relative():
    """Shifting the places of query and key leaves their product; another difference changes it."""
    h, w, d = 6, 8, 24
    q, k = torch.randn(2, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation = rotation_of(h, w, 1, d, torch.device("cpu")).double()
    q, k = (rotate(x.expand(h * w, d), rotation) for x in (q, k))
    assert torch.allclose(q.norm(dim=1), q.norm(dim=1)[:1].expand(h * w))
    products = (q @ k.T).reshape(h, w, h, w)
    assert torch.allclose(products[0, 1, 2, 2], products[3, 6, 5, 7], atol=1e-5)
    for other in ((0, 2, 2, 2), (1, 1, 2, 2), (2, 2, 0, 1), (0, 1, 1, 3)):
        assert (products[0, 1, 2, 2] - products[other]).abs() > 1e-2, other


def test_tokens_of_several_modalities_at_one_place_turn_alike():
    once, twice = (rotation_of(2, 3, copies, 8, torch.device("cpu")) for copies in (1, 2))
    assert once.shape == (2, 6, 4) and torch.equal(twice, torch.cat([once, once], 1))
    angle = torch.atan2(once[1], once[0])[5]  # of row 1, column 2
    assert torch.allclose(angle, torch.tensor([1, 0.1, 2, 0.2]))


def test_modern_attention_does_not_depend_on_the_size_of_queries_and_keys():
    attention, x = BLOCKS["modern"](48, 2).attn, torch.randn(2, 16, 48)
    rotation = rotation_of(4, 4, 1, 24, x.device)
    before = attention(x, rotation)
    with torch.no_grad():
        for part in attention.qkv.weight, attention.qkv.bias:
            part[:96] *= 10  # queries and keys
    assert torch.allclose(attention(x, rotation), before, atol=1e-5)
    with torch.no_grad():
        attention.qkv.weight[96:] *= 10
    assert (attention(x, rotation) - before).abs().max() > 0.1


@pytest.mark.parametrize("fusion", ["linear", "sequence"])
def test_modern_blocks_tell_rows_from_columns(fusion):
    """Without the position table; also on rectangles."""
    model = random_model(SMALL, blocks="modern", fusion=fusion)
    model.pos_embed.data.zero_()
    x, *rest = inputs(size=(8, 12))
    v, turned = model(x, *rest)[0], model(x.mT, *rest)[0]
    assert v.shape == x.shape and turned.shape == x.mT.shape
    shuffled = model(x.roll(4, 2), *rest)[0].roll(-4, 2)
    assert (shuffled - v).abs().max() > 1e-4


def test_modern_blocks_train_after_they_have_sampled():
    """The rotations kept from inference are no inference tensors; in bf16 all is nearly the same."""
    rotation_of.cache_clear()
    model = random_model(SMALL, blocks="modern")
    with torch.inference_mode():
        v = model(*inputs())[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*inputs())[0]
    rough.float().square().mean().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert (rough - v).std() < 0.03 * v.std()


def test_middle_heads_read_the_state_after_block_encoder_depth():
    model = random_model(SMALL, middle_heads=True)
    plain, (v, z, v_mid) = model(*inputs()), model(*inputs(), middle=True)
    assert torch.equal(plain[0], v) and torch.equal(plain[1], z) and not torch.allclose(v, v_mid)
    shorter = random_model(SMALL)
    shorter.load_state_dict(model.state_dict(), strict=False)
    shorter.heads.load_state_dict(model.middle_heads.state_dict())
    shorter.blocks = shorter.blocks[:1]  # encoder_depth of SMALL
    assert torch.equal(shorter(*inputs())[0], v_mid)


def test_a_conv_projector_sees_a_tokens_neighbours():
    model = random_model(SMALL, projector_kind="conv")
    assert sum(p.numel() for p in model.projector.parameters()) == 9 * 48 * 768 + 768
    model.projector.bias.data.zero_()
    tokens = torch.zeros(1, 24, 48)
    tokens[0, 2 * 6 + 1] = 1  # row 2, column 1 of 4 x 6
    seen = model.project(tokens, 4, 6).abs().sum(2).reshape(4, 6) > 0
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1:4, 0:3] = True
    assert torch.equal(seen, expected)
    assert model(*inputs(size=(8, 12)))[1].shape == (3, 24, 768)
