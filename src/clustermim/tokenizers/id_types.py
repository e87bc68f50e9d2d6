"""How small a whole number may be that holds any id of a vocabulary."""

from typing import Any

import numpy as np


def id_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest integers that hold the ids 0 to K − 1; signed from 32 bits on, where the sign costs nothing."""
    for dtype in (np.uint8, np.uint16, np.int32):
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(np.int64)
