"""Several features side by side, brought to one scale, and as principal components where asked."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clustermim.errors import InputError
from clustermim.features.moments import ImagePasses, Moments, no_variance
from clustermim.features.patches import PatchFeatures, rebuild_features
from clustermim.features.projection import EPSILON, Projection, principal
from clustermim.features.spelling import SpecPart


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """What stands behind `|`."""

    pca: int | None = None
    """Principal components kept; None keeps the dimensions as they are."""
    whiten: bool = False
    """Bring the components to unit variance."""
    epsilon: float = EPSILON
    """Damps the whitening: share of the mean eigenvalue that is added to each."""
    balance: bool = True
    """Scale each part so that its total variance is 1."""

    @classmethod
    def from_spec(cls, tail: SpecPart | None) -> "JoinOptions":
        """Read the options of a spec's tail.

        Raises
        ------
        InputError
            Unknown options, or values that make no sense.
        """
        if tail is None:
            return cls()
        tail.check_options(["pca", "whiten", "epsilon", "balance"])
        pca = tail.integer("pca")
        if pca is not None and pca < 1:
            raise InputError(f"Features `{tail.text}`: pca keeps at least 1 component, not {pca}.")
        return cls(
            pca=pca,
            whiten=tail.flag("whiten"),
            epsilon=tail.number("epsilon", EPSILON),
            balance=tail.flag("balance", True),
        )


class JoinedFeatures(PatchFeatures):
    """`a+b[|pca=64&whiten=true&epsilon=0.1&balance=false]`: the dimensions of a, then those of b.

    K-means looks at squared distances, in which the part with the largest variance would decide alone. So, unless
    `balance=false`, each part is divided by the root of its total variance (the sum over its dimensions, on the
    training patches): all parts then weigh the same, whatever their number of dimensions. With `pca`, the scaled
    dimensions are centred and replaced by their first principal components; with `whiten`, each of those is brought
    to unit variance. A tail may stand behind a single feature, too.

    Parameters
    ----------
    parts
        The features, each made for the same patches.
    options
        What stands behind `|`.
    spec
        As the user wrote it; None writes it anew.
    fitted
        Whether the state that will be loaded is a fitted one.

    Raises
    ------
    InputError
        More components than dimensions.
    """

    scale: Tensor

    def __init__(
        self,
        parts: Sequence[PatchFeatures],
        options: JoinOptions | None = None,
        *,
        spec: str | None = None,
        fitted: bool = False,
    ) -> None:
        options = JoinOptions() if options is None else options
        spec = "+".join(part.spec for part in parts) if spec is None else spec
        whole = sum(part.dim for part in parts)
        if options.pca is not None and options.pca > whole:
            raise InputError(f"Features `{spec}` have {whole} dimensions: pca can keep {whole} at most.")
        projects = options.pca is not None or options.whiten
        dim = whole if options.pca is None else options.pca
        super().__init__(spec, patch_size=parts[0].patch_size, channels=parts[0].channels, dim=dim)
        self.options = options
        self.parts = nn.ModuleList(parts)
        self.fitted = fitted
        self._balances = options.balance and len(parts) > 1
        self.projection = Projection(whole, dim) if projects else None
        if self._balances and not projects:  # in a projection it is part of the matrix
            self.register_buffer("scale", torch.ones(whole))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "JoinedFeatures":
        """Rebuild each part."""
        parts = [rebuild_features(part) for part in config["parts"]]
        return cls(parts, JoinOptions(**config["options"]), spec=config["spec"], fitted=config["fitted"])

    def config(self) -> dict[str, Any]:
        """The configs of the parts, and what is done with them."""
        return {
            "name": "+",
            "spec": self.spec,
            "parts": [part.config() for part in self._members()],
            "options": asdict(self.options),
            "fitted": self.fitted,
        }

    @property
    def batch_invariant(self) -> bool:
        """Where all parts are, and nothing is projected."""
        return self.projection is None and all(part.batch_invariant for part in self._members())

    @property
    def needs_fit(self) -> bool:
        """Where parts are scaled or projected, or one of them needs it itself."""
        own = (self._balances or self.projection is not None) and not self.fitted
        return own or any(part.needs_fit for part in self._members())

    def fit(self, images: ImagePasses) -> dict[str, Any]:
        """First the parts that need it, each in its pass, then scale and components in one more."""
        facts: dict[str, Any] = {}
        for part in self._members():
            if part.needs_fit:
                facts |= part.fit(images)
        if not self._balances and self.projection is None:
            self.fitted = True
            return facts
        sizes = [part.dim for part in self._members()]
        moments = Moments(sum(sizes))
        with torch.no_grad():
            for batch in images():
                moments.add(self._side_by_side(batch).flatten(0, 1))
        moments.finish(self.spec)
        variances = torch.stack([part.sum() for part in torch.split(moments.covariance.diagonal(), sizes)])
        for part, constant in zip(self._members(), torch.split(moments.constant, sizes), strict=True):
            if bool(constant.all()):
                raise no_variance(part.spec, moments.rows)
        weights = variances.rsqrt() if self._balances else torch.ones_like(variances)
        scale = weights.repeat_interleave(torch.tensor(sizes))
        if self.projection is None:
            self.scale.copy_(scale)
        else:
            whiten, epsilon = self.options.whiten, self.options.epsilon
            centre, matrix, share = principal(moments, scale, self.dim, whiten=whiten, epsilon=epsilon)
            self.projection.set(centre, matrix)
            facts |= {"pca_explained_variance": share}
        if self._balances:
            facts |= {
                "part_variance": {part.spec: float(v) for part, v in zip(self._members(), variances, strict=True)}
            }
        self.fitted = True
        return facts

    def describe(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Concatenate along D, scale or project."""
        joined = self._side_by_side(images)
        if self.projection is not None:
            projected: Tensor = self.projection(joined)
            return projected
        return joined * self.scale if self._balances else joined

    def _side_by_side(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return torch.cat([part.describe(images) for part in self._members()], dim=2)

    def _members(self) -> list[PatchFeatures]:
        return [part for part in self.parts if isinstance(part, PatchFeatures)]
