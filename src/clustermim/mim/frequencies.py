"""How often each token comes, and the weights that keep frequent ones from drowning the rest."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clustermim.data.loaders import Loader
from clustermim.tokenizers.tokenizer import Tokenizer


@torch.no_grad()
def count_tokens(tokenizer: Tokenizer, loader: Loader) -> Int64[Tensor, " k"]:
    """Occurrences of each token in one pass over a loader of eval views, on the CPU."""
    counts = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for batch in loader.epoch():
        ids = tokenizer.encode(batch.images, index=batch.index, labels=batch.labels)
        counts += torch.bincount(ids.flatten(), minlength=tokenizer.vocab_size).cpu()
    return counts


def inverse_sqrt_weights(counts: Int64[Tensor, " k"]) -> Float[Tensor, " k"]:
    """A weight for each token, proportional to 1/√count, with mean 1 over the patches counted.

    So the loss keeps its scale, and a token n times as frequent has √n times the say instead of n times (Mikolov et al.
    2013 thin out frequent words alike). A token that was not seen is weighted as if it had come once.
    """
    shares = counts.double()
    weights = shares.clamp_min(1.0).rsqrt()
    return (weights * shares.sum() / (weights * shares).sum()).float()
