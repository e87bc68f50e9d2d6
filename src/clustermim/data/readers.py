"""Decoding one image file rightly: grey, 16-bit, palette, transparent, CMYK, EXIF-rotated, TIFF of several channels.

Every reader returns the pixels as they are stored, (C, H, W), as uint8, uint16, another integer type or float;
`pixels.to_unit` gives them their scale. Transparent pixels are shown on white, as on paper. Of an animation the first
frame is read.
"""

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from clustermim.data.pixels import BadImage

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".avif", ".ico"}
)
_GREY_MODES = frozenset({"1", "L", "LA", "La", "F", "I", "I;16", "I;16L", "I;16B", "I;16N"})
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_JPEG_MAGIC = b"\xff\xd8\xff"
_EXIF_ORIENTATION = 0x0112


def decode(data: bytes) -> np.ndarray:
    """Pixels of an encoded image.

    Parameters
    ----------
    data
        The contents of the file.

    Returns
    -------
    numpy.ndarray
        (C, H, W) as stored; C is 1 for grey, 3 for colour, any number for TIFF.

    Raises
    ------
    BadImage
        When the bytes are no image, are cut short, or are of a kind that nothing installed can read.
    """
    try:
        if data[:4] in _TIFF_MAGIC:
            return _decode_tiff(data)
        if data[:8] == _PNG_MAGIC and len(data) > 25 and data[24] == 16 and data[25] in (2, 4, 6):
            return _decode_deep_png(data)
        with Image.open(io.BytesIO(data)) as image:
            return from_pil(image)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image" if data else "an empty file") from None
    except Exception as problem:  # a decoder may raise anything on broken bytes
        text = " ".join(str(problem).split()) or type(problem).__name__
        raise BadImage(text[:120]) from None


def glance(data: bytes) -> None:
    """Check without decoding that a file begins as an image, and that JPEG and PNG files also end as one.

    Raises
    ------
    BadImage
        When the bytes are no image, or visibly cut short.
    """
    # Cameras append bytes after the end marker, so it is looked for, not expected last.
    tail = max(0, len(data) - 65536)
    if data[:3] == _JPEG_MAGIC:
        if data.rfind(b"\xff\xd9", tail) < 0:
            raise BadImage("truncated JPEG")
    elif data[:8] == _PNG_MAGIC:
        if data.rfind(b"IEND", tail) < 0:
            raise BadImage("truncated PNG")
    elif data[:4] not in _TIFF_MAGIC:
        try:
            Image.open(io.BytesIO(data)).close()
        except Exception:
            raise BadImage("not an image" if data else "an empty file") from None


def from_pil(image: Image.Image) -> np.ndarray:
    """Pixels (C, H, W) of a Pillow image: turned upright, transparency shown on white, colour as RGB."""
    # Pillow reads the pixels here, and raises OSError when the file is cut short.
    image.load()
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        return np.asarray(image).astype(np.uint16)[None]
    if image.mode == "I":
        values = np.asarray(image)
        fits = values.min() >= 0 and values.max() <= 65535
        return values.astype(np.uint16 if fits else np.int32)[None]
    if image.mode == "F":
        return np.array(image, dtype=np.float32)[None]
    grey = image.mode in _GREY_MODES
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        return _on_white(rgba[..., :1] if grey else rgba[..., :3], rgba[..., 3:]).transpose(2, 0, 1)
    mode = "L" if grey else "RGB"
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array[None] if grey else np.ascontiguousarray(array.transpose(2, 0, 1))


def _on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Transparent pixels (H, W, C) composited over white, in the integer type of the image."""
    full = float(np.iinfo(colour.dtype).max)
    share = alpha.astype(np.float64) / full
    return np.round(colour * share + full * (1 - share)).astype(colour.dtype)


def _decode_deep_png(data: bytes) -> np.ndarray:
    """16-bit colour PNG, of which Pillow keeps 8 bits and torchvision all 16."""
    import torch
    from torchvision.io import ImageReadMode, decode_png

    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels = decode_png(raw, mode=ImageReadMode.UNCHANGED).numpy()
    if pixels.shape[0] in (2, 4):
        return np.ascontiguousarray(_on_white(pixels[:-1], pixels[-1:]))
    return np.asarray(pixels)


def _decode_tiff(data: bytes) -> np.ndarray:
    """TIFF: photographs by Pillow, which knows palettes, CMYK and alpha; everything scientific by tifffile."""
    import tifffile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            series, page = file.series[0], file.pages.first
            if _is_photograph(series, page):
                with Image.open(io.BytesIO(data)) as image:
                    return from_pil(image)
            try:
                array = series.asarray()
            except ValueError as problem:
                # tifffile leaves some compressions to another package; Pillow knows them, for single grey pages.
                if "imagecodecs" not in str(problem) or page.samplesperpixel != 1 or len(series.pages) != 1:
                    raise
                with Image.open(io.BytesIO(data)) as image:
                    return from_pil(image)
            array = _channels_first(array, series.axes)
            if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind == "u":
                array = np.iinfo(array.dtype).max - array
            return _upright(array, page)


def _is_photograph(series: Any, page: Any) -> bool:
    from tifffile import EXTRASAMPLE, PHOTOMETRIC

    if len(series.pages) != 1 or page.dtype is None or page.dtype.itemsize != 1 or page.sampleformat not in (1, None):
        return False
    if page.photometric in (PHOTOMETRIC.PALETTE, PHOTOMETRIC.YCBCR):
        return True
    if page.photometric == PHOTOMETRIC.SEPARATED:
        return bool(page.samplesperpixel == 4)
    if page.photometric == PHOTOMETRIC.RGB:
        alpha = tuple(page.extrasamples or ()) in ((EXTRASAMPLE.ASSOCALPHA,), (EXTRASAMPLE.UNASSALPHA,))
        return bool(page.samplesperpixel == 3 or (page.samplesperpixel == 4 and alpha))
    return bool(page.samplesperpixel == 1)


def _channels_first(array: np.ndarray, axes: str) -> np.ndarray:
    """A TIFF series as (C, H, W): C from its axes, else the axis that is not Y or X, else the smallest."""
    keep = [place for place, length in enumerate(array.shape) if length > 1 or axes[place] in "YX"]
    array, axes = array.reshape([array.shape[place] for place in keep]), "".join(axes[place] for place in keep)
    if array.ndim == 2:
        return np.ascontiguousarray(array[None])
    if array.ndim != 3:
        raise BadImage(f"TIFF of axes {axes} and shape {array.shape}; one axis besides height and width can be read")
    named = [place for place, axis in enumerate(axes) if axis in "CS"]
    if not named and "Y" in axes and "X" in axes:
        named = [place for place, axis in enumerate(axes) if axis not in "YX"]
    channel = named[0] if len(named) == 1 else int(np.argmin(array.shape))
    return np.ascontiguousarray(np.moveaxis(array, channel, 0))


def _upright(array: np.ndarray, page: Any) -> np.ndarray:
    """(C, H, W) turned by the TIFF orientation tag (values 1 to 8, TIFF 6.0 section 8)."""
    tag = page.tags.get(_EXIF_ORIENTATION)
    orientation = int(tag.value) if tag is not None else 1
    if orientation in (5, 6, 7, 8):
        array = array.transpose(0, 2, 1)
    if orientation in (3, 4, 7, 8):
        array = array[:, ::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, :, ::-1]
    return np.ascontiguousarray(array)
