"""Mask images: the class of each pixel of a source's images, cut and resized as its eval view is."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional

from clustermim.data.pixels import BadImage
from clustermim.data.readers import IMAGE_SUFFIXES, decode
from clustermim.data.sources import ImageSource
from clustermim.data.views import ViewConfig, centre_draw
from clustermim.errors import InputError

IGNORED = 255
"""Pixels of this value have no class."""


class MaskImages:
    """The masks of one split of a source; all are looked up when it is made, none is read.

    Parameters
    ----------
    masks
        A folder whose files are called as the images are, but for the ending: `train/a/001.png` belongs to
        `train/a/001.jpg`. Or an array (n, H, W) of integers for all images of the source, as it lists them, or a .npz
        file that holds it as `masks`.
    source
        Images.

    Raises
    ------
    InputError
        No masks there, or an image without one: the first is named.
    """

    def __init__(self, masks: str | Path | np.ndarray, source: ImageSource) -> None:
        self.name, self._rows, self._source = source.name, source.rows, source
        self._array: np.ndarray | None = None
        if not isinstance(masks, np.ndarray) and Path(masks).suffix == ".npz" and Path(masks).is_file():
            with np.load(masks, allow_pickle=False) as held:
                if "masks" not in held:
                    raise InputError(f"--masks {masks} holds no array 'masks', but {', '.join(held) or 'nothing'}.")
                masks = np.asarray(held["masks"])
        if isinstance(masks, np.ndarray):
            total = len(source.collection.store)
            if masks.ndim != 3 or masks.dtype.kind not in "iu" or len(masks) != total:
                raise InputError(
                    f"Masks must be integers (n, H, W), one for each of the {total} images of {source.name}; these are "
                    f"{masks.dtype} of shape {masks.shape}."
                )
            self._array = masks
            return
        folder = Path(masks)
        if not folder.is_dir():
            raise InputError(
                f"--masks {folder} is no folder and no .npz file. Give one with a mask image for each image."
            )
        known = {
            path.relative_to(folder).with_suffix("").as_posix(): path
            for path in folder.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES
        }
        names = [source.collection.store.label_of(int(row)) for row in self._rows]
        missing = [name for name in names if Path(name).with_suffix("").as_posix() not in known]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(names)} images of {source.name} ({source.split}) have no mask in {folder}: "
                f"the first is {missing[0]}. A mask is called as its image is, with any image ending."
            )
        self._files = [known[Path(name).with_suffix("").as_posix()] for name in names]

    def __len__(self) -> int:
        return len(self._rows)

    def fingerprint(self) -> str:
        """Identifies the masks: pixels of an array, names and sizes of files."""
        digest = hashlib.sha256(np.ascontiguousarray(self._rows, dtype=np.int64).tobytes())
        if self._array is not None:
            digest.update(f"{self._array.shape} {self._array.dtype}".encode() + self._array.tobytes())
        else:
            digest.update("\0".join(f"{file.name} {file.stat().st_size}" for file in self._files).encode())
        return digest.hexdigest()

    def raw(self, index: int) -> Int64[Tensor, "H W"]:
        """Class of each pixel, as stored; InputError when the file is no picture of one channel."""
        if self._array is not None:
            return torch.from_numpy(self._array[int(self._rows[index])].astype(np.int64))
        file = self._files[index]
        try:
            pixels = _decode_mask(file)
        except BadImage as problem:
            raise InputError(f"The mask {file} cannot be read: {problem}.") from None
        return torch.from_numpy(pixels.astype(np.int64))

    def view(self, index: int, config: ViewConfig) -> Int64[Tensor, "h w"]:
        """The mask as the eval view of its image is cut; the nearest pixel counts, so that no class is invented.

        Raises
        ------
        InputError
            An unreadable mask, or one that has not the shape of its image (smaller or larger in proportion will do).
        """
        mask = self.raw(index)
        self._check_shape(index, mask)
        box = centre_draw(torch.tensor([list(mask.shape)]), config)
        top, left, height, width = (int(side) for side in (box.top, box.left, box.height, box.width))
        cut = mask[top : top + height, left : left + width]
        if tuple(cut.shape) == config.image_size:
            return cut
        return functional.interpolate(cut[None, None].double(), config.image_size, mode="nearest-exact")[0, 0].long()

    def _check_shape(self, index: int, mask: Int64[Tensor, "H W"]) -> None:
        height, width = self._source.size_of(index)
        if abs(mask.shape[0] * width - mask.shape[1] * height) >= max(height, width):  # a pixel may be rounded away
            which = f"mask {index}" if self._array is not None else f"mask {self._files[index]}"
            raise InputError(
                f"The {which} has {mask.shape[0]} × {mask.shape[1]} pixels, but its image "
                f"{self._source.collection.store.label_of(int(self._rows[index]))} has {height} × {width}: a mask must "
                "cover the image, pixel by pixel or in proportion."
            )


def _decode_mask(file: Path) -> np.ndarray:
    """Palette images hold class numbers, whatever their colours."""
    from PIL import Image

    data = file.read_bytes()
    try:
        with Image.open(file) as image:
            if image.mode == "P":
                return np.array(image)
    except OSError:
        raise BadImage("not an image") from None
    pixels = decode(data)
    if len(pixels) != 1 or pixels.dtype.kind not in "iu":
        raise BadImage(f"it has {len(pixels)} channels of {pixels.dtype}; one of whole numbers is needed")
    first: np.ndarray = pixels[0]
    return first
