"""Files of pictures: which can be written, what a written one says of itself, and what a file that cannot be
read is told to be.

Nothing here imports torch, so that a mistake is known at once.
"""

import io
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SigmaError
from .reading import parse_json, parsing, refuse_special
from .writing import is_special, write_beside

if TYPE_CHECKING:
    from PIL import Image

KEY = "pixart_sigma"  # of a PNG's text, and in the comment of the others

# What a name's ending writes: Pillow's name of the format, and how it is saved. The lossy ones keep what an
# eye can see, colours at full resolution included.
FORMATS: dict[str, tuple[str, dict]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
}
EXIF_FOLDER, USER_COMMENT = 0x8769, 0x9286  # Exif 2.3, sections 4.6.3 and 4.6.5
ASCII = b"ASCII\0\0\0"
MOST_EXIF = 65533  # bytes in the one segment of a JPEG
SAYING = {"pnginfo", "exif"}  # of what `save_options` gives
MOST_LETTERS = 48  # of a prompt, in a file's name

# What is read. Pillow hands others to another program, as EPS, or to libraries that no picture needs.
READ = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "GIF", "PPM", "TGA", "JPEG2000", "ICO")


def check_ending(path: Path) -> str:
    """The ending, which says what kind of picture is to be written; SigmaError for another. A device or a
    pipe without one gets a PNG."""
    if not path.suffix and is_special(path):
        return ".png"
    if path.suffix.lower() not in FORMATS:
        ending = f"ends in {path.suffix}" if path.suffix else "has no ending"
        raise SigmaError(f"{path} {ending}; end the picture's name in .png, .jpg or .webp.")
    return path.suffix


def write_picture(path: Path, picture: "Image.Image", said: str = "", new: bool = False) -> bool:
    """Write a picture in the format of its name, whole or not at all; whether `said` is in it, see
    `save_options`. new: FileExistsError where there is such a file already."""
    options = save_options(check_ending(path), picture, said)
    write_beside(path, lambda file: picture.save(file, **options), new)
    return bool(options.keys() & SAYING) or not said


def picture_bytes(picture: "Image.Image", ending: str, said: str = "") -> bytes:
    """What `write_picture` writes into a file whose name ends so."""
    content = io.BytesIO()
    picture.save(content, **save_options(ending, picture, said))
    return content.getvalue()


def save_options(ending: str, picture: "Image.Image", said: str) -> dict[str, Any]:
    """How Pillow saves a picture in the format of an ending, with what is said of it.

    A PNG has it as text under KEY, a JPEG and a WebP in the Exif user comment, as JSON under KEY. What is too
    long for a JPEG is left out there.
    """
    name, options = FORMATS[ending.lower()]
    found: dict[str, Any] = {"format": name, **options}
    if said and name == "PNG":
        from PIL.PngImagePlugin import PngInfo

        found["pnginfo"] = PngInfo()
        found["pnginfo"].add_text(KEY, said)
    elif said:
        comment = json.dumps({KEY: json.loads(said)}).encode("ascii")
        exif = picture.getexif()
        exif[EXIF_FOLDER] = {USER_COMMENT: ASCII + comment}
        if name != "JPEG" or len(exif.tobytes()) <= MOST_EXIF:
            found["exif"] = exif.tobytes()
    return found


def read_said(path: str | Path) -> str | None:
    """What `write_picture` was given to say, or None. Raises SigmaError for a file that is no picture."""
    with open_picture(path) as picture:
        text = getattr(picture, "text", {}).get(KEY)
        if text is not None:
            return text
        comment: Any = picture.getexif().get_ifd(EXIF_FOLDER).get(USER_COMMENT)
    try:
        with parsing(path):
            if isinstance(comment, bytes):
                comment = comment.removeprefix(ASCII).decode("ascii")
            return json.dumps(parse_json(comment)[KEY])
    except SigmaError:
        return None  # another program's comment


@contextmanager
def open_picture(path: str | Path) -> Iterator["Image.Image"]:
    """The picture of a file, to be read within this block.

    Raises SigmaError for a file that is no picture, is damaged or has too many pixels, and OSError where
    there is none that may be read.
    """
    from PIL import Image

    refuse_special(path)
    with open(path, "rb") as file, warnings.catch_warnings():
        # Pillow warns of half of what it refuses; what it refuses is refused here.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.init()
        readable = [name for name in READ if name in Image.OPEN]
        with named_if_damaged(path), Image.open(file, formats=readable) as picture:
            yield picture


@contextmanager
def named_if_damaged(name: str | Path) -> Iterator[None]:
    """Within this block, what Pillow raises while it reads a picture becomes a SigmaError that names it."""
    from PIL import Image, UnidentifiedImageError

    advice = "Open it in another program and save it again."
    with parsing(name, "is a damaged picture", advice, SigmaError):
        try:
            yield
        except UnidentifiedImageError:
            raise SigmaError(
                f"{name} is not a picture that can be read; give a PNG, JPEG or WebP file."
            ) from None
        except Image.DecompressionBombError as error:
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
            raise SigmaError(
                f"{name} is larger than the {most} million pixels that are read; make it smaller first."
            ) from error


def name_of(prompt: str) -> str:
    """The prompt's first words as a file name: letters and digits of any script, joined by underscores."""
    words = re.findall(r"[^\W_]+", prompt.lower())
    name = ""
    for word in words:
        longer = f"{name}_{word}" if name else word[:MOST_LETTERS]
        if len(longer) > MOST_LETTERS:
            break
        name = longer
    return name or "picture"
