"""Every kind of image file is read to the pixels that were put into it."""

import io

import numpy as np
import pytest
import torch
from image_kinds import DEEP, FLOAT, GREY, MANY, RGB, TURNS, encode, first, kinds, tiff
from PIL import Image
from torchvision.io import encode_png

from clustermim.data.pixels import BadImage, OutOfRange, adapt_channels, to_unit
from clustermim.data.readers import decode, glance
from clustermim.errors import InputError

KINDS = kinds()


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_that_were_written(kind):
    data, expected = KINDS[kind]
    pixels = decode(data)
    assert pixels.dtype == expected.dtype
    np.testing.assert_array_equal(pixels, expected)
    glance(data)


def test_jpeg_grey_colour_and_cmyk():
    smooth = np.stack([np.add.outer(np.arange(32) * 2, np.arange(48) * 3)] * 3, 2).astype(np.uint8)
    smooth[..., 1] //= 2
    grey = decode(encode(Image.fromarray(smooth[..., 0]), "JPEG", quality=95))
    assert grey.shape == (1, 32, 48) and abs(grey[0].astype(int) - smooth[..., 0]).max() < 6
    for mode in ("RGB", "CMYK"):
        colour = decode(encode(Image.fromarray(smooth).convert(mode), "JPEG", quality=95, subsampling=0))
        assert colour.shape == (3, 32, 48) and abs(colour.astype(int) - first(smooth)).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_exif_orientation_is_undone(orientation, form):
    stored = np.ascontiguousarray(TURNS[orientation](RGB))
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encode(Image.fromarray(stored), form, exif=exif)), first(RGB))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_scientific_tiff_is_undone(orientation):
    stored = np.ascontiguousarray(TURNS[orientation](DEEP))
    data = tiff(stored, photometric="minisblack", extratags=[(0x0112, "H", 1, orientation, True)])
    np.testing.assert_array_equal(decode(data), first(DEEP))


def test_16_bit_colour_png_keeps_its_depth():
    import zlib

    def chunk(name, body):
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    def png(pixels, colour):
        height, width = pixels.shape[:2]
        header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, colour, 0, 0, 0])
        lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
        return (
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
        )

    deep = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], 2)
    np.testing.assert_array_equal(decode(png(deep, 2)), first(deep))
    see_through = np.concatenate([deep, np.zeros((6, 9, 1), np.uint16)], 2)
    assert (decode(png(see_through, 6)) == 65535).all()


def test_torchvision_png_is_read_too():
    data = bytes(encode_png(torch.from_numpy(first(RGB))).numpy().tobytes())
    np.testing.assert_array_equal(decode(data), first(RGB))


@pytest.mark.parametrize("data", [b"", b"hello, I am no image", b"\xff\xd8\xff", b"II*\0broken", b"\x89PNG\r\n\x1a\n"])
def test_broken_bytes_are_bad_images(data):
    with pytest.raises(BadImage):
        decode(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "GIF"])
def test_truncated_files_are_bad_images(form):
    whole = encode(Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)), form)
    with pytest.raises(BadImage):
        decode(whole[: len(whole) // 2])
    if form in ("PNG", "JPEG"):
        with pytest.raises(BadImage, match=f"truncated {form}"):
            glance(whole[: len(whole) // 2])


def test_a_glance_tells_images_from_other_files():
    with pytest.raises(BadImage, match=r"not an image"):
        glance(b"some text")
    with pytest.raises(BadImage, match=r"an empty file"):
        glance(b"")


def test_scale_of_each_type():
    assert to_unit(first(GREY), None).dtype == torch.uint8
    np.testing.assert_allclose(to_unit(first(DEEP), None).numpy(), DEEP[None] / 65535, atol=1e-6)
    np.testing.assert_array_equal(to_unit(first(FLOAT), None).numpy(), FLOAT[None])
    ranged = to_unit(first(DEEP), (1000, 3000)).numpy()
    np.testing.assert_allclose(ranged, np.clip((DEEP[None] - 1000.0) / 2000, 0, 1), atol=1e-6)
    signed = DEEP.astype(np.int16)[None]
    np.testing.assert_allclose(to_unit(signed, (-32768, 32767)).numpy(), (signed + 32768.0) / 65535, atol=1e-6)


def test_unknown_ranges_and_nan_are_bad():
    with pytest.raises(OutOfRange, match=r"float values from -3 to 5"):
        to_unit(np.array([[[-3.0, 5.0]]]), None)
    with pytest.raises(OutOfRange, match=r"int32"):
        to_unit(np.array([[[0, 1]]], dtype=np.int32), None)
    with pytest.raises(BadImage, match=r"NaN"):
        to_unit(np.array([[[0.5, np.nan]]]), (0, 1))


def test_channels_convert_between_one_and_three_only():
    grey, colour = torch.from_numpy(first(GREY)), torch.from_numpy(first(RGB))
    assert torch.equal(adapt_channels(grey, 3), torch.cat([grey] * 3))
    np.testing.assert_array_equal(
        adapt_channels(colour, 1)[0].numpy(), np.round(RGB.astype(np.float32) @ np.float32([0.299, 0.587, 0.114]))
    )
    with pytest.raises(InputError, match=r"only 1 and 3"):
        adapt_channels(torch.from_numpy(MANY[:, None].astype(np.float32))[:, 0], 3)


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(np.full((6, 9), value, np.uint8)) for value in (10, 200)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert (decode(file.getvalue()) == 10).all()
