"""Small pictures of every kind, written to bytes, each with the pixels a reader must find in it."""

import io

import numpy as np
import tifffile
from PIL import Image

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
FLOAT = RNG.random((6, 9)).astype(np.float32)
ALPHA = RNG.integers(0, 256, (6, 9, 1), dtype=np.uint8)
MANY = RNG.integers(0, 65536, (5, 6, 9), dtype=np.uint16)  # channels first


def encode(image, form, **options):
    """A Pillow image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def tiff(array, **options):
    """An array as the bytes of a TIFF file."""
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def first(array):
    """(H, W[, C]) as (C, H, W)."""
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def on_white(colour, alpha):
    """What a transparent picture looks like on paper."""
    share = alpha.astype(np.float64) / 255
    return np.round(colour * share + 255 * (1 - share)).astype(np.uint8)


def _palette():
    indices = RNG.integers(0, 4, (6, 9), dtype=np.uint8)
    colours = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
    image = Image.frombytes("P", (9, 6), indices.tobytes())
    image.putpalette(colours.tobytes())
    return image, indices, colours


def kinds():
    """Name -> (bytes, pixels (C, H, W))."""
    palette, indices, colours = _palette()
    seen = colours.copy()
    seen[2] = 255  # the transparent entry
    bits = GREY > 127
    cmyk = np.concatenate([255 - RGB, np.zeros((6, 9, 1), np.uint8)], axis=2)
    deep_rgb = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], axis=2)
    return {
        "grey png": (encode(Image.fromarray(GREY), "PNG"), first(GREY)),
        "rgb png": (encode(Image.fromarray(RGB), "PNG"), first(RGB)),
        "black and white png": (encode(Image.fromarray(bits), "PNG"), first(bits * np.uint8(255))),
        "16-bit png": (encode(Image.fromarray(DEEP), "PNG"), first(DEEP)),
        "palette png": (encode(palette, "PNG"), first(colours[indices])),
        "palette png with transparency": (encode(palette, "PNG", transparency=2), first(seen[indices])),
        "palette gif": (encode(palette, "GIF"), first(colours[indices])),
        "rgba png": (encode(Image.fromarray(np.concatenate([RGB, ALPHA], 2)), "PNG"), first(on_white(RGB, ALPHA))),
        "grey png with alpha": (
            encode(Image.fromarray(np.concatenate([GREY[..., None], ALPHA], 2), "LA"), "PNG"),
            first(on_white(GREY[..., None], ALPHA)),
        ),
        "rgb png with a transparent colour": (
            encode(Image.fromarray(np.full((6, 9, 3), 7, np.uint8)), "PNG", transparency=(7, 7, 7)),
            np.full((3, 6, 9), 255, np.uint8),
        ),
        "bmp": (encode(Image.fromarray(RGB), "BMP"), first(RGB)),
        "16-bit pgm": (b"P5 9 6 65535\n" + DEEP.astype(">u2").tobytes(), first(DEEP)),
        "cmyk tiff": (encode(Image.fromarray(cmyk, "CMYK"), "TIFF"), first(RGB)),
        "grey tiff": (tiff(GREY), first(GREY)),
        "16-bit tiff": (tiff(DEEP), first(DEEP)),
        "16-bit big-endian tiff": (tiff(DEEP, byteorder=">"), first(DEEP)),
        "16-bit tiff, white is zero": (tiff(65535 - DEEP, photometric="miniswhite"), first(DEEP)),
        "16-bit lzw tiff": (encode(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"), first(DEEP)),
        "float tiff": (tiff(FLOAT), first(FLOAT)),
        "rgb tiff": (tiff(RGB, photometric="rgb"), first(RGB)),
        "16-bit rgb tiff": (tiff(deep_rgb, photometric="rgb"), first(deep_rgb)),
        "rgba tiff": (
            encode(Image.fromarray(np.concatenate([RGB, ALPHA], 2)), "TIFF"),
            first(on_white(RGB, ALPHA)),
        ),
        "palette tiff": (encode(palette, "TIFF"), first(colours[indices])),
        "tiff of five pages": (tiff(MANY, photometric="minisblack"), MANY),
        "tiff of five channels last": (
            tiff(MANY.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig"),
            MANY,
        ),
        "tiff of five planes": (tiff(MANY, photometric="minisblack", planarconfig="separate"), MANY),
        "imagej tiff of five channels": (tiff(MANY, imagej=True, metadata={"axes": "CYX"}), MANY),
        "tiff of two channels": (
            tiff(MANY[:2].astype(np.uint8).transpose(1, 2, 0), photometric="minisblack", planarconfig="contig"),
            MANY[:2].astype(np.uint8),
        ),
        "deflate tiff of five channels": (
            tiff(MANY, photometric="minisblack", planarconfig="separate", compression="zlib"),
            MANY,
        ),
    }


TURNS = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
"""EXIF orientation -> how the camera stores an upright picture (H, W[, C])."""
