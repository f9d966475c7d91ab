"""The size that a checkpoint was trained for, by its name and its metadata."""

from pathlib import Path

import pytest

from pixart_sigma.transformer.variant import ONETRAINER, find_variant, variant_in_metadata, variant_in_name


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("PixArt-Sigma-XL-2-2K-MS", "2K"),
        ("PixArt-Sigma-XL-2-1024-MS", "1024"),
        ("PixArt-Sigma-XL-2-512-MS", "512"),
        ("PixArt-Sigma-XL-2-256x256", "256"),
        ("pixart_sigma_2k_16bit", "2K"),
        ("sigma_512px", "512"),
        ("PixArtSigma-2048", "2K"),
        ("pixart_sigma_xl2_img512_laion2M", "512"),
        ("pixart_sigma_xl2_img1K", "1024"),
        ("pixartSigma_2kFp16", "2K"),
        ("PixArtSigma2K", "2K"),
        ("pixartsigma1kfp16", "1024"),
        ("anime512_v2", "512"),
        ("sigma512_step256", "512"),
        ("Sigma1024x1024", "1024"),
        ("pixart-900m-1024-ft", "1024"),
    ],
)
def test_a_name_with_a_size(name, variant):
    assert variant_in_name(name) == variant


@pytest.mark.parametrize(
    "name",
    [
        "sigma",
        "epoch_2_step_512",
        "from-512-to-1024",
        "run-15123",
        "sigma_512steps",
        "anime_rank256",
        "sigma_12k",
    ]
    + ["bs256", "sigma-20k-2ksteps", "step1024", "sigma_v2", "2know", "sigma_1.2k", "seed_512_ckpt1024"],
)
def test_a_name_without(name):
    assert variant_in_name(name) is None


@pytest.mark.parametrize(
    ("metadata", "variant"),
    [
        ({"modelspec.resolution": "1024x1024"}, "1024"),
        ({"modelspec.resolution": "512"}, "512"),
        ({"ss_resolution": "(2048, 2048)"}, "2K"),
        ({"modelspec.resolution": "1152x896"}, "1024"),
        ({"modelspec.resolution": "768x768"}, None),
        ({"modelspec.resolution": "large"}, None),
        ({}, None),
    ],
)
def test_metadata(metadata, variant):
    assert variant_in_metadata(metadata) == variant


def test_what_goes_first():
    file = Path("sigma_512.safetensors")
    resolution = {"modelspec.resolution": "2048x2048"}

    def find(chosen=None, settings=None, positions=None, metadata=None, file=file):
        return find_variant(chosen, settings or {}, positions, metadata or {}, file, file)

    positions = (1, 4096, 1152)
    assert find("256", {"sample_size": 64}, positions, resolution) == ("256", "user")
    assert find(None, {"sample_size": 64}, positions, resolution) == ("512", "config")
    assert find(None, {}, positions, resolution) == ("1024", "pos_embed")
    assert find(None, {}, None, resolution) == ("2K", "metadata")
    assert find() == ("512", "file name")
    assert find(file=Path("sigma.safetensors")) == ("1024", "default")
    # OneTrainer writes positions for 1024 into files of every size.
    assert find(None, {}, positions, ONETRAINER) == ("512", "file name")
