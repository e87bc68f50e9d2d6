"""Colours: one theme for figures and pages in light and dark, and one distinct colour for every token."""

import numpy as np
from jaxtyping import Float, Int64, UInt8

THEME: dict[str, tuple[str, str]] = {
    "ink": ("#1b2026", "#e4e7ea"),
    "soft": ("#59626d", "#a3acb7"),
    "rule": ("#d3d8de", "#3a424c"),
    "paper": ("#fefefd", "#14171a"),
    "panel": ("#f3f4f6", "#1d2126"),
    "link": ("#0b5cad", "#7db5f0"),
    "mark": ("#fff3d1", "#3b3216"),
    "series-1": ("#1f66b0", "#71abe9"),
    "series-2": ("#c4551b", "#f0985f"),
    "series-3": ("#2a8555", "#6cc798"),
    "series-4": ("#7a4cb3", "#b598e8"),
    "series-5": ("#a8862a", "#dcbd62"),
    "muted": ("#87909b", "#7b8591"),
}
"""Name -> (light, dark). The light values are all different: a figure's colours are found again in its SVG by them."""

SERIES = tuple(name for name in THEME if name.startswith("series-"))
"""The theme colours for data, in the order in which to use them."""


def light(name: str) -> str:
    """The light value of a theme colour, as ``#rrggbb``; figures are drawn in it."""
    return THEME[name][0]


def themed(svg: str) -> str:
    """Replace the light theme colours in SVG text by CSS variables, so that a figure follows the page it stands in."""
    for name, (value, _) in THEME.items():
        svg = svg.replace(value, f"var(--{name},{value})")
    return svg


def token_colours(order: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k 3"]:
    """One colour a token, all different, readable under both black and white digits.

    Parameters
    ----------
    order
        Rank of each token (a permutation of 0..K-1). Tokens of near rank get near hues and unlike lightness, so that
        a map of a thousand similar tokens still shows the image, and neighbours can be told apart.

    Returns
    -------
    array
        (K, 3) sRGB in 0..255; row i belongs to token i.
    """
    k = len(order)
    rank = np.asarray(order, dtype=np.float64)
    # Three interleaved levels of lightness: two neighbours in hue never share one.
    level = np.asarray([0.82, 0.66, 0.74])[np.asarray(order) % 3]
    chroma = np.asarray([0.11, 0.15, 0.13])[np.asarray(order) % 3]
    hue = 2 * np.pi * (rank / max(k, 1) * 0.94 + 0.04)
    rgb = np.round(_oklch_to_srgb(level, chroma, hue) * 255).astype(np.int64)
    return _all_different(rgb)


def _oklch_to_srgb(
    level: Float[np.ndarray, " k"], chroma: Float[np.ndarray, " k"], hue: Float[np.ndarray, " k"]
) -> Float[np.ndarray, "k 3"]:
    """OKLCH (Ottosson 2020) to sRGB in [0, 1], clipped to the gamut."""
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    cone = np.stack(
        [
            level + 0.3963377774 * a + 0.2158037573 * b,
            level - 0.1055613458 * a - 0.0638541728 * b,
            level - 0.0894841775 * a - 1.2914855480 * b,
        ],
        axis=-1,
    )
    to_rgb = np.asarray(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(cone**3 @ to_rgb.T, 0.0, 1.0)
    srgb: Float[np.ndarray, "k 3"] = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return srgb


def _all_different(rgb: Int64[np.ndarray, "k 3"]) -> UInt8[np.ndarray, "k 3"]:
    """Move a colour that is already taken to the nearest free value of its blue, then green and red channel."""
    taken: set[int] = set()
    codes = rgb[:, 0] * 65536 + rgb[:, 1] * 256 + rgb[:, 2]
    for i, code in enumerate(codes.tolist()):
        free = code
        while free in taken:
            free = (free + 1) % 2**24
        taken.add(free)
        codes[i] = free
    return np.stack([codes // 65536, codes // 256 % 256, codes % 256], axis=-1).astype(np.uint8)
