"""modalities.py: pictures and arrays of any sort as the registry's, and back."""
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from distributed import InputError
from images import canny, centre_crop
from modalities import MODALITIES, PLAIN_FACTS, PLAIN_SHOWN, Flat, Picture, Scalar, Shown, Vector, shown_of


def read(path, modality, facts=PLAIN_FACTS, **options):
    row = MODALITIES[modality]
    return row.array(row.open(path, facts), **options)


def test_registry_round_trips():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((6, 6, 3)).astype(np.float32)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    disparity = rng.random((6, 6)).astype(np.float32)
    disparity = (disparity - disparity.min()) / np.ptp(disparity)
    colours = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    for m, row in MODALITIES.items():
        array = colours
        if isinstance(row, Scalar):
            array = disparity
        elif isinstance(row, Vector):
            array = normal
        assert np.allclose(row.from_pixels(row.to_pixels(array)), array, atol=1e-5), m
        assert row.picture(array).dtype == np.uint8 and row.picture(array).shape == (6, 6, 3)


def test_levels_between_two_pixels_are_rounded():
    row = MODALITIES["canny"]
    wide = row.resize(np.repeat(np.uint8([[[0], [255]]]), 3, 2), (1, 4))
    assert wide[0, :, 0].tolist() == [0, 64, 191, 255]


def test_resized_normals_are_of_length_1():
    resized = MODALITIES["normal"].resize(np.float32([[[1, 0, 0], [0, 1, 0]]]), (3, 5))
    assert np.allclose(np.linalg.norm(resized, axis=-1), 1)


def test_canny_finds_a_square():
    image = np.full((40, 40, 3), 60, np.uint8)
    image[10:30, 12:28] = 200
    edges = canny(image)[..., 0] == 255
    rows, _ = np.nonzero(edges)
    assert set(np.unique(rows)) <= set(range(9, 31))
    assert edges[20, 11:13].any() and edges[20, 27:29].any() and edges[9:11, 20].any()
    assert 60 < edges.sum() < 80  # one pixel wide
    assert not canny(np.full((40, 40, 3), 60, np.uint8)).any()


def test_unusual_pictures_are_read_correctly(tmp_path):
    rng = np.random.default_rng(0)
    colours = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    image = Image.fromarray(colours)
    image.save(tmp_path / "plain.png")
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    image.quantize(256).save(tmp_path / "palette.png")
    alpha = image.copy()
    alpha.putalpha(255)
    alpha.save(tmp_path / "alpha.png")

    def fit(image, nearest):
        return centre_crop(image, 64, nearest)
    for name in ("plain.png", "cmyk.tif", "palette.png", "alpha.png"):
        found = read(tmp_path / name, "rgb", fit=fit)
        assert found.shape == (64, 64, 3) and np.abs(found.astype(int) - colours).mean() < 2, name
    alpha.putalpha(0)
    alpha.save(tmp_path / "clear.png")
    assert (read(tmp_path / "clear.png", "rgb") == 255).all()
    grey = rng.integers(0, 65536, (64, 64)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey16.png")
    as_depth = read(tmp_path / "grey16.png", "depth")
    assert np.allclose(as_depth, grey / 65535, atol=1e-6)  # all 16 bits
    as_rgb = read(tmp_path / "grey16.png", "rgb")
    assert as_rgb.shape == (64, 64, 3) and np.abs(as_rgb[..., 0] - grey / 257).max() < 1
    Image.fromarray(colours[..., 0]).save(tmp_path / "grey.png")
    assert read(tmp_path / "grey.png", "rgb").shape == (64, 64, 3)
    np.save(tmp_path / "depth.npy", np.array([[1.0, 2.0], [4.0, 0.0]], np.float32))
    disparity = read(tmp_path / "depth.npy", "depth", PLAIN_FACTS._replace(depth_space="depth"))
    assert disparity.tolist() == [[1.0, 0.5], [0.25, 0.25]]  # 0 is unknown: a nearest is taken


def test_adm_centre_crop():
    values = np.arange(200 * 300 * 3, dtype=np.uint32).reshape(200, 300, 3)
    assert centre_crop(Image.fromarray(values.astype(np.uint8)), 64).size == (64, 64)
    square = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    assert np.array_equal(np.asarray(centre_crop(square, 64)), np.asarray(square))
    flat = Image.fromarray(np.kron(np.array([[0, 255]]), np.ones((300, 150))).astype(np.uint8))
    assert set(np.unique(np.asarray(centre_crop(flat, 64, nearest=True)))) == {0, 255}


def test_arrays_are_checked_and_flat_ones_stay_flat(tmp_path):
    squares = np.kron(np.array([[0, 200], [200, 0]]), np.ones((40, 40)))
    np.save(tmp_path / "seg.npy", squares[..., None].repeat(3, 2).astype(np.float32))
    seg = read(tmp_path / "seg.npy", "seg", fit=lambda image, nearest: centre_crop(image, 33, nearest))
    assert isinstance(MODALITIES["seg"], Flat) and set(np.unique(seg)) == {0, 200} and seg.dtype == np.uint8
    np.save(tmp_path / "normal.npy", np.full((8, 8, 3), 200.0))
    np.save(tmp_path / "solid.npy", np.zeros((8, 8, 3)))
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04" + bytes(100))
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (8, 8\n"  # never closed: tokenize's error
    length = len(header).to_bytes(2, "little")
    (tmp_path / "header.npy").write_bytes(b"\x93NUMPY\x01\x00" + length + header)
    for name, modality in (("normal", "normal"), ("solid", "depth"), ("zip", "depth"), ("header", "depth")):
        with pytest.raises(InputError, match=f"{name}.npy"):
            read(tmp_path / f"{name}.npy", modality)


def test_depth_is_stretched_between_the_quantiles_of_its_known_pixels(tmp_path):
    """Of 0 to 100 they are 2 and 98; ten unknown pixels, filled with 100, would draw the second up. Of the
    left half, 0 to 50, they are 1 and 49.
    """
    def left(image, nearest=False):
        return image.crop((0, 0, 51, 1))

    row, values = MODALITIES["depth"], np.full((1, 111), np.nan, np.float32)
    values[0, :101] = np.arange(101)
    np.save(tmp_path / "d.npy", values)
    raster = row.open(tmp_path / "d.npy")
    whole = row.pixels(raster, shown=Shown(depth_norm="quantile"))
    assert whole[:, 0, [0, 2, 26, 50, 98, 100, 110]] == pytest.approx(
        np.tile([-1, -1, -0.5, 0, 1, 1, 1], (3, 1)), abs=1e-6)
    for over, at in (("crop", {13: -0.5, 25: 0, 49: 1, 50: 1}), ("picture", {0: -1, 26: -0.5, 50: 0})):
        part = row.pixels(raster, left, Shown(depth_norm="quantile", depth_over=over))[0, 0]
        assert part[list(at)] == pytest.approx(list(at.values()), abs=1e-6) and len(part) == 51


def test_log_depth_is_near_bright_and_of_files_of_depth_alone(tmp_path):
    """1, 2 and 4 metres or levels lie evenly; what is unknown takes the nearest, 4. A bicubic fit's
    undershoot beside an edge does not widen the range.
    """
    row, log = MODALITIES["depth"], Shown(depth_target="log")
    depth = PLAIN_FACTS._replace(depth_space="depth")
    for dtype in (np.float32, np.uint16, np.uint8):
        np.save(tmp_path / "d.npy", np.array([[1, 2, 4, 0]], dtype))
        found = row.pixels(row.open(tmp_path / "d.npy", depth), shown=log)
        assert found == pytest.approx(np.tile([1, 0, -1, -1], (3, 1, 1)), abs=1e-6)
    with pytest.raises(InputError, match="d.npy: depth is learned as log, .*--depth-space depth"):
        row.pixels(row.open(tmp_path / "d.npy"), shown=log)
    edge = np.full((40, 40), 2, np.uint8)
    edge[:, 20:] = 128
    np.save(tmp_path / "edge.npy", edge)
    found = row.pixels(row.open(tmp_path / "edge.npy", depth), lambda image, _: centre_crop(image, 30), log)
    assert (found[:, :, :8] == 1).all() and found.min() == -1
    assert "log" in row.meant(log) and row.meant(PLAIN_SHOWN) == row.meaning


def test_what_older_files_do_not_say_of_depth_is_as_it_was():
    assert shown_of({}, "c.pt") == Shown("crop", "black", "minmax", "disparity") == PLAIN_SHOWN
    released = shown_of({"shown": {"depth_over": "picture", "uncovered": "colour"}}, "c.pt")
    assert released == Shown("picture", "colour", "minmax", "disparity")
    told = {"depth_norm": "quantile", "depth_target": "log"}
    assert shown_of({"shown": told}, "c.pt").told() == told


def test_labels_of_a_large_picture_lie_where_its_colours_lie():
    """A crop by the nearest pixel takes the middle of what it stands for, however large the picture."""
    columns = np.tile(np.arange(640, dtype=np.uint16) // 10, (640, 1)).astype(np.uint8)
    assert (np.asarray(centre_crop(Image.fromarray(columns), 64, True)) == np.arange(64)).all()


def test_a_palette_of_greys_says_no_more_than_the_labels(tmp_path):
    """As of L pictures that were turned to P: label k is grey k, not the colour of another label."""
    palette = np.array([[128, 64, 128], [0, 0, 0], [70, 70, 70]], np.uint8)
    facts = PLAIN_FACTS._replace(seg_mode="semantic", palette=palette)
    for name, used in (("one", [0]), ("two", [0, 2])):
        labels = np.resize(np.array(used, np.uint8), (4, 6))
        Image.fromarray(labels).convert("P").save(tmp_path / f"{name}.png")
        raster = MODALITIES["seg"].open(tmp_path / f"{name}.png", facts)
        assert (raster.labels == labels).all() and (raster.values == palette[labels]).all()


def test_colours_of_no_class_are_unknown():
    palette = np.array([[128, 64, 128], [0, 0, 142]], np.uint8)
    image = palette[[[0, 0, 1, 1]]].repeat(2, 0)
    image[0, 0], image[1, 0] = (0, 0, 0), (130, 60, 125)
    facts = PLAIN_FACTS._replace(palette=palette)
    row = MODALITIES["seg"]
    found = row.of_classes(row.of_picture("a.png", Picture(image, "RGB"), facts)._replace(facts=facts))
    assert found.known.tolist() == [[False, True, True, True], [True] * 4]
    assert found.values[0, 0].tolist() in ([128, 64, 128], [130, 60, 125])  # a nearest known one's
    colourful = row.of_picture("a.png", Picture(image, "RGB"), facts._replace(void=-1))
    assert colourful.known is None  # of no colour: the last class is one like the others


def test_values_that_would_be_misread_are_refused(tmp_path):
    wide = bytes(np.random.default_rng(0).integers(0, 256, 4 * 4 * 3 * 2, np.uint8))
    rows = b"".join(b"\0" + wide[i:i + 24] for i in range(0, 96, 24))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)  # 16 bits, three channels
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    (tmp_path / "wide.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert read(tmp_path / "wide.png", "rgb").shape == (4, 4, 3)
    with pytest.raises(InputError, match="wide.png: has several channels of 16 bits"):
        read(tmp_path / "wide.png", "depth")
    np.save(tmp_path / "shares.npy", np.full((4, 4, 3), 1.02, np.float32))
    with pytest.raises(InputError, match="shares.npy: holds float32 .* needs .* levels from 0 to 255"):
        read(tmp_path / "shares.npy", "rgb")


def test_numbers_of_another_byte_order_are_the_same(tmp_path):
    depth = np.arange(1, 13, dtype=np.uint16).reshape(3, 4) * 100
    for name, kind in (("little", "<u2"), ("big", ">u2")):
        np.save(tmp_path / f"{name}.npy", depth.astype(kind))
    assert (read(tmp_path / "little.npy", "depth") == read(tmp_path / "big.npy", "depth")).all()


def test_resizing_does_not_send_the_nearest_pixels_far_away(tmp_path):
    """Bicubic goes below the least of 8 bits: such a depth is the least one, not unknown or infinite."""
    depth = np.full((96, 96), 200, np.uint8)
    depth[30:60, 30:60] = 12
    Image.fromarray(depth).save(tmp_path / "d.png")
    found = read(tmp_path / "d.png", "depth", PLAIN_FACTS._replace(depth_space="depth"),
                 fit=lambda image, nearest: centre_crop(image, 64, nearest))
    assert found.max() == np.float32(1 / 12) and found.min() > 1 / 256
