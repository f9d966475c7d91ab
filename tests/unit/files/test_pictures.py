"""Pictures as people have them, from files, from Pillow and as tensors; and masks."""

import warnings

import numpy
import pytest
import torch
from PIL import Image, ImageCms

from pixart_sigma.errors import SigmaError
from pixart_sigma.files.picture_files import read_said, write_picture
from pixart_sigma.files.pictures import (
    Start,
    as_mask,
    as_picture,
    latent_mask,
    read_mask,
    read_picture,
)

RED, WHITE, BLACK = (1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
NAN = float("nan")


@pytest.fixture
def saved(tmp_path):
    """`saved(picture, name, **options) -> path`: the picture as Pillow writes it."""

    def save(picture, name="picture.png", **options):
        picture.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def halves(mode, left, right, size=(8, 4)):
    """A picture whose left half has one colour and whose right half another."""
    picture = Image.new(mode, size, right)
    picture.paste(left, (0, 0, size[0] // 2, size[1]))
    return picture


def colours(pixels):
    """The colours of the left and the right edge, of (3, H, W)."""
    return [tuple(pixels[:, 1, column].tolist()) for column in (0, -1)]


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.webp", "photo.tiff"])
def test_a_camera_held_upright_gives_an_upright_picture(saved, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise to show it
    lying = Image.new("RGB", (40, 20), "blue")
    lying.paste("red", (0, 0, 20, 20))
    pixels = read_picture(saved(lying, name, exif=exif))
    assert pixels.shape == (3, 40, 20)
    assert pixels[0, 2, 10] > 0.9 > 0.1 > pixels[0, -3, 10]  # red is on top


def test_what_is_transparent_shows_white_paper(saved):
    palette = halves("P", 1, 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    for picture, options in (
        (halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)), {}),
        (palette, {"transparency": 0}),
        (halves("RGB", (255, 0, 0), (0, 0, 0)), {"transparency": (0, 0, 0)}),
    ):
        assert colours(read_picture(saved(picture, **options))) == [RED, WHITE], picture.mode
    assert colours(as_picture(halves("LA", (0, 255), (0, 0)))) == [BLACK, WHITE]
    palette.putalpha(halves("L", 255, 0))
    assert palette.mode == "PA" and colours(as_picture(palette)) == [RED, WHITE]
    half = as_picture(Image.new("RGBA", (8, 8), (0, 0, 0, 127)))
    assert half.mean() == pytest.approx(128 / 255, abs=0.005)


@pytest.mark.parametrize(
    "name, mode, colour",
    [("p.png", "P", "red"), ("c.jpg", "CMYK", (0, 255, 255, 0)), ("y.jpg", "RGB", "red")],
)
def test_colours_of_other_modes(saved, name, mode, colour):
    picture = Image.new("RGB", (8, 8), "red").convert("P") if mode == "P" else Image.new(mode, (8, 8), colour)
    assert read_picture(saved(picture, name)).mean((1, 2)).tolist() == pytest.approx(RED, abs=0.02)


def test_grey_of_one_and_of_eight_bits(saved):
    assert colours(read_picture(saved(halves("1", 0, 1)))) == [BLACK, WHITE]
    assert colours(read_picture(saved(halves("L", 0, 255)))) == [BLACK, WHITE]


@pytest.mark.parametrize("name", ["grey.png", "grey.tiff"])
def test_grey_of_sixteen_bits_keeps_its_tones(saved, name):
    ramp = numpy.linspace(0, 65535, 64, dtype=numpy.uint16).reshape(8, 8)
    pixels = read_picture(saved(Image.fromarray(ramp), name))
    assert torch.allclose(pixels[1], torch.from_numpy(ramp.astype("float32")) / 65535)
    wide = Image.fromarray(ramp.astype(numpy.int32))
    assert wide.mode == "I" and torch.equal(as_picture(wide), pixels)


def test_float_grey_is_taken_from_0_to_1_and_else_refused(saved):
    ramp = numpy.linspace(0, 1, 64, dtype=numpy.float32).reshape(8, 8)
    pixels = read_picture(saved(Image.fromarray(ramp), "grey.tiff"))
    assert torch.equal(pixels[2], torch.from_numpy(ramp))
    for other, words in (
        (ramp * 255, "from 0 to 255"),
        (ramp - 0.5, "from -0.5 to 0.5"),
        (ramp * NAN, "NaN"),
    ):
        with pytest.raises(SigmaError, match=f"grey.tiff holds .*{words}"):
            read_picture(saved(Image.fromarray(other), "grey.tiff"))


def test_whole_numbers_of_an_unknown_range_are_refused(saved):
    ramp = numpy.arange(64, dtype=numpy.int32).reshape(8, 8)
    for numbers in (ramp, ramp * 4000, ramp - 5):
        with pytest.raises(SigmaError, match="grey.tiff holds grey from .* 8 or 16 bits"):
            read_picture(saved(Image.fromarray(numbers), "grey.tiff"))


@pytest.mark.parametrize("name", ["moving.gif", "moving.webp", "moving.png", "pages.tiff"])
def test_of_several_frames_the_first_is_taken(saved, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = saved(frames[0], name, save_all=True, append_images=frames[1:])
    expected = pytest.approx(RED, abs=0.02)
    assert read_picture(path).mean((1, 2)).tolist() == expected
    with Image.open(path) as picture:
        picture.seek(1)
        assert as_picture(picture).mean((1, 2)).tolist() == expected


def test_lab_colours(saved):
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (8, 8), "red"),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert read_picture(saved(lab, "lab.tiff")).mean((1, 2)).tolist() == pytest.approx(RED, abs=0.02)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.webp", "cut.gif", "cut.tiff"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_file_that_was_cut_is_named(saved, name, share):
    noise = numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=numpy.uint8)
    path = saved(Image.fromarray(noise), name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(SigmaError, match=f"{name} is (a damaged|not a) picture"):
        read_picture(path)


def test_a_changed_byte_is_named(saved):
    path = saved(Image.new("RGB", (64, 64), "red"))
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    with pytest.raises(SigmaError, match="picture.png is a damaged picture"):
        read_picture(path)


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "page.png").write_text("<!DOCTYPE html>")
    with pytest.raises(SigmaError, match="page.png is not a picture that can be read"):
        read_picture(tmp_path / "page.png")
    with pytest.raises(FileNotFoundError, match="gone.png"):
        read_picture(tmp_path / "gone.png")


def test_a_picture_with_too_many_pixels_is_refused_and_a_large_one_taken_without_a_warning(
    saved, monkeypatch
):
    path = saved(Image.new("L", (50, 50), 255))
    for most, refused in ((1000, True), (2000, False)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if not refused:
                assert read_picture(path).shape == (3, 50, 50)
                continue
            for read in (read_picture, read_said):
                with pytest.raises(SigmaError, match="picture.png is larger than the .* million pixels"):
                    read(path)


def test_pillow_and_a_file_of_it_are_one_picture(saved):
    noise = numpy.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=numpy.uint8)
    picture = Image.fromarray(noise)
    expected = torch.from_numpy(noise).permute(2, 0, 1).float() / 255
    assert torch.equal(as_picture(picture), expected)
    assert torch.equal(read_picture(saved(picture)), expected)
    assert torch.equal(as_picture(expected), expected)


PIXELS = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "image, words",
    [
        (PIXELS[None], r"\(1, 3, 16, 24\).*one and not a batch: give image\[0\]"),
        (PIXELS.permute(1, 2, 0), r"\(16, 24, 3\).*give image.permute\(2, 0, 1\)"),
        (torch.rand(16, 24, 4), r"image.permute\(2, 0, 1\)"),
        (torch.rand(4, 16, 24), r"without transparency: give image\[:3\]"),
        (PIXELS[:1], r"image.expand\(3, -1, -1\)"),
        (PIXELS[0], r"image.expand\(3, -1, -1\)"),
        (torch.rand(5, 16, 24), r"image is \(5, 16, 24\)"),
        (PIXELS[:, :0], r"image is empty: \(3, 0, 24\)"),
        (PIXELS * NAN, "NaN or infinity"),
        (PIXELS * 255, r"from .* to 25\d.*give image / 255"),
        ((PIXELS * 255).byte(), r"uint8; .*image.float\(\) / 255"),
        (PIXELS * 2 - 1, r"from -0.99.* give image / 2 \+ 0.5"),
        (PIXELS * 1.1, r"give image.clamp\(0, 1\)"),
        (PIXELS.numpy(), "image is a ndarray; give a Pillow image"),
        ("from.png", "image is a str; give a Pillow image"),
        (Image.new("RGB", (0, 5)), r"image has no pixels \(0x5\)"),
        (Image.fromarray(numpy.full((4, 4), 300, numpy.float32)), "image holds grey from 300 to 300"),
    ],
)
def test_other_pictures_are_refused_with_what_to_do(image, words):
    with pytest.raises(SigmaError, match=words):
        as_picture(image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_taken(dtype):
    assert torch.equal(as_picture(PIXELS.to(dtype)), PIXELS.to(dtype).float())


# Masks


def test_a_mask_is_white_where_it_is_painted_and_transparent_where_it_is_kept(saved):
    for picture in (
        halves("L", 255, 0),
        halves("RGB", "white", "black"),
        halves("RGBA", (255, 255, 255, 255), (255, 255, 255, 0)),
        halves("1", 1, 0),
    ):
        mask = read_mask(saved(picture))
        assert mask.shape == (1, 4, 8)
        assert torch.equal(mask[0, 0], torch.tensor([1.0] * 4 + [0.0] * 4))
        assert torch.equal(as_mask(picture, torch.zeros(3, 4, 8)), mask)
    grey = as_mask(torch.eye(4, dtype=torch.bool), torch.zeros(3, 8, 8))
    assert torch.equal(grey, torch.eye(4)[None])


@pytest.mark.parametrize(
    "mask, words",
    [
        (torch.ones(1, 16, 16), "mask is 16x16 and the picture 24x16"),
        (torch.zeros(1, 16, 24), "black everywhere"),
        (torch.full((1, 16, 24), 0.4), "black everywhere"),
        (torch.ones(16, 24) * 255, r"mask / 255"),
        (torch.ones(3, 16, 24), r"mask is \(3, 16, 24\)"),
        (torch.ones(16, 24, dtype=torch.uint8), "uint8"),
        (torch.ones(1, 16, 24) * NAN, "NaN"),
        (torch.ones(1, 0, 24), "empty"),
        ("mask.png", "mask is a str"),
    ],
)
def test_other_masks_are_refused_with_what_to_do(mask, words):
    with pytest.raises(SigmaError, match=words):
        as_mask(mask, PIXELS)


def test_a_mask_of_another_size_and_the_same_shape_is_taken():
    for size, picture in (((8, 12), (16, 24)), ((32, 48), (16, 24)), ((17, 25), (170, 251))):
        assert as_mask(torch.ones(size), torch.rand(3, *picture)).shape == (1, *size)


def test_a_mask_needs_a_picture():
    with pytest.raises(SigmaError, match="give the picture too"):
        Start.of(None, torch.ones(1, 8, 8))


def test_each_latent_with_a_white_pixel_is_painted():
    mask = torch.zeros(1, 32, 48)
    mask[0, 7, 8:16] = 1  # one row, at the lower edge of its 8x8 pixels
    mask[0, 16:24, 47] = 1
    expected = torch.zeros(4, 6)
    expected[0, 1] = expected[2, 5] = 1
    assert torch.equal(latent_mask(mask, 48, 32)[0, 0], expected)


def test_a_mask_on_the_grid_is_diffusers_own():
    from diffusers.image_processor import VaeImageProcessor

    cells = (torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) > 0.5).byte() * 255
    picture = Image.fromarray(cells.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy())
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    theirs = torch.nn.functional.interpolate(processor.preprocess(picture, 48, 64), size=(6, 8))
    ours = latent_mask(as_mask(picture, torch.zeros(3, 48, 64)), 64, 48)
    assert torch.equal(ours, theirs)


# Written files


@pytest.mark.parametrize("name", ["picture.png", "picture.jpg", "picture.JPEG", "picture.webp"])
@pytest.mark.parametrize("prompt", ["a red circle", '雪の中の狐 🦊 "quoted"\n\\'])
def test_a_file_says_what_it_was_given_to_say(tmp_path, name, prompt):
    import json

    said = json.dumps({"prompt": prompt, "seed": 7}, ensure_ascii=False)
    picture = Image.new("RGB", (32, 32), "red")
    assert write_picture(tmp_path / name, picture, said)
    assert json.loads(read_said(tmp_path / name)) == json.loads(said)
    with Image.open(tmp_path / name) as written:
        assert written.format == {"png": "PNG", "webp": "WEBP"}.get(name.rpartition(".")[2].lower(), "JPEG")
        near = numpy.asarray(written.convert("RGB"), int) - numpy.asarray(picture, int)
    assert abs(near).max() <= 8


def test_what_is_too_long_for_a_jpeg_is_left_out_there(tmp_path):
    said = '{"prompt": "' + "word " * 20_000 + '"}'
    picture = Image.new("RGB", (32, 32), "red")
    assert not write_picture(tmp_path / "long.jpg", picture, said)
    assert read_said(tmp_path / "long.jpg") is None
    assert write_picture(tmp_path / "long.webp", picture, said) and read_said(tmp_path / "long.webp")


@pytest.mark.parametrize("comment", [b"ASCII\0\0\0hello", b"UNICODE\0h\0i\0", b"", "text", b"ASCII\0\0\0[1]"])
def test_another_programs_comment_says_nothing(saved, comment):
    exif = Image.Exif()
    exif[0x8769] = {0x9286: comment}
    assert read_said(saved(Image.new("RGB", (8, 8)), "other.jpg", exif=exif)) is None


def test_a_name_of_another_kind_is_refused(tmp_path):
    for name in ("picture.gif", "picture", "picture.png.tmp"):
        with pytest.raises(SigmaError, match=r"end the picture's name in .png, .jpg or .webp"):
            write_picture(tmp_path / name, Image.new("RGB", (8, 8)))
    assert not list(tmp_path.iterdir())
