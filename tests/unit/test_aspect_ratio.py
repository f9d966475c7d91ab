"""Size tables and the choice of a size, against diffusers' own."""

import math
import random

import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma

from pixart_sigma.aspect_ratio import (
    BINNING,
    TABLES,
    buckets,
    by_ratio,
    check_size,
    crop_back,
    nearest,
    parse_size,
)
from pixart_sigma.errors import SigmaError

REFERENCE = {
    256: alpha.ASPECT_RATIO_256_BIN,
    512: alpha.ASPECT_RATIO_512_BIN,
    1024: alpha.ASPECT_RATIO_1024_BIN,
    2048: sigma.ASPECT_RATIO_2048_BIN,
}
MULTIPLE = {256: 16, 512: 32, 1024: 64, 2048: 128, 2880: 64, 4096: 128}


@pytest.mark.parametrize("base", REFERENCE)
def test_binning_tables_equal_the_reference(base):
    expected = {float(key): (int(height), int(width)) for key, (height, width) in REFERENCE[base].items()}
    assert {float(key): size for key, size in BINNING[base // 8].items()} == expected


def test_training_tables_are_whole():
    assert {base: len(table) for base, table in TABLES.items()} == {
        256: 40,
        512: 40,
        1024: 40,
        2048: 40,
        2880: 40,
        4096: 33,
    }
    for base, table in TABLES.items():
        assert table["1.0"] == (base, base)
        for key, (height, width) in table.items():
            assert height % MULTIPLE[base] == 0 and width % MULTIPLE[base] == 0
            assert abs(height / width - float(key)) < 0.1
            assert 0.85 * base**2 < height * width < 1.01 * base**2


@pytest.mark.parametrize("base", REFERENCE)
def test_binning_picks_what_the_reference_picks(base):
    rng = random.Random(base)
    for _ in range(2000):
        width, height = rng.randint(16, 8192), rng.randint(16, 8192)
        expected = PixArtImageProcessor.classify_height_width_bin(height, width, REFERENCE[base])
        bucket = nearest(width, height, base, binning=True)
        assert (bucket.height, bucket.width) == expected


def test_nearest_uses_every_trained_ratio():
    assert nearest(1984, 512, 1024).width == 1984
    assert nearest(1984, 512, 1024, binning=True).width == 2048
    for base in TABLES:
        found = {(bucket.width, bucket.height) for bucket in buckets(base)}
        assert found == {(width, height) for height, width in TABLES[base].values()}
    for bucket in buckets(1024):
        assert nearest(bucket.width, bucket.height, 1024) == bucket


def test_ratios_are_written_width_to_height():
    landscape = by_ratio("16:9", 1024)
    assert (landscape.width, landscape.height, landscape.ratio) == (1344, 768, "7:4")
    portrait = by_ratio("9:16", 1024)
    assert (portrait.width, portrait.height, portrait.ratio) == (768, 1344, "4:7")
    assert by_ratio("1:1", 512) == by_ratio(1.0, 512)
    assert by_ratio(16 / 9, 1024) == landscape
    assert by_ratio("2.39:1", 2048).width == 3072
    assert (by_ratio("4:1", 4096).width, by_ratio("1:4", 4096).height) == (8192, 8192)


@pytest.mark.parametrize(
    "ratio",
    ["axb", "16:0", "0:9", "-16:9", "-16:-9", "16", "16:9:1", "", ":", "nan:1", "inf:1", "1:inf"]
    + ["5:1", "1:5", math.nan, math.inf, 0, -1.0, None, [16, 9], "1e-320:1e300"],
)
def test_a_bad_ratio_is_refused(ratio):
    with pytest.raises(SigmaError, match="16:9|1:4 and 4:1"):
        by_ratio(ratio, 1024)


@pytest.mark.parametrize(
    "value", [0, -1, -512, 15, 8193, 10**9, 512.0, math.nan, math.inf, "512", None, True]
)
def test_a_bad_size_is_refused(value):
    with pytest.raises(SigmaError, match="width"):
        check_size(value, 512)
    with pytest.raises(SigmaError, match="height"):
        check_size(512, value)
    with pytest.raises(SigmaError):
        nearest(value, 512, 1024)


def test_sizes_as_text():
    assert parse_size("1024x768") == (1024, 768)
    assert parse_size(" 16X8192 ") == (16, 8192)
    check_size(16, 8192)
    for text in ["axb", "1024", "1024x", "x768", "1024x768x3", "1024.5x768", "nanxnan", "", "1024:768"]:
        with pytest.raises(SigmaError, match="1024x768"):
            parse_size(text)
    for text in ["0x512", "-512x512", "512x8193"]:
        with pytest.raises(SigmaError, match="16 to 8192"):
            parse_size(text)


@pytest.mark.parametrize("base", [0, 768, 4097, "1024", None])
def test_an_unknown_base_is_refused(base):
    with pytest.raises(SigmaError, match="1024"):
        buckets(base)


def test_binning_stops_at_2048():
    with pytest.raises(SigmaError, match="2880"):
        nearest(512, 512, 2880, binning=True)


def test_crop_back_equals_the_reference():
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for _ in range(300):
        height, width = rng.choice(list(TABLES[256].values()))
        images = torch.rand((2, 3, height, width), generator=generator)
        asked = rng.randint(16, 400), rng.randint(16, 400)
        result = crop_back(images, *asked)
        assert result.shape == (2, 3, asked[1], asked[0])
        reference = PixArtImageProcessor.resize_and_crop_tensor(images, *asked)
        if reference.shape == result.shape:
            assert torch.equal(result, reference)
            compared += 1
    assert compared > 250


def test_crop_back_covers_where_the_reference_falls_short():
    # int(480 * (965 / 480)) is 964: diffusers then cuts nearly everything away.
    images = torch.rand(1, 3, 96, 480)
    assert PixArtImageProcessor.resize_and_crop_tensor(images, 965, 64).shape != (1, 3, 64, 965)
    assert crop_back(images, 965, 64).shape == (1, 3, 64, 965)


def test_crop_back_keeps_a_picture_of_the_asked_size():
    images = torch.rand(1, 3, 48, 64)
    assert crop_back(images, 64, 48) is images
