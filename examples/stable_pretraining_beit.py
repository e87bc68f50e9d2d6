"""BEiT of stable-pretraining on our tokens.

stable-pretraining's `BEiT` takes any callable that maps images (B, C, H, W) to ids (B, N), and brings none but a
placeholder that hashes patches. A fitted `Tokenizer` is such a callable. Three things must agree:

- `vocab_size` and `patch_size` are the tokenizer's;
- images are in [0, 1], as the tokenizer wants them, so the encoder must normalise them itself: a hook on its patch
  embedding does, and its weights keep their names;
- colour images (its BEiT tries three channels when it is made).

    pip install clustermim stable-pretraining
    clustermim tokenizer fit --data PHOTOS --features pixel --k 50 --patch-size 16 --image-size 224 --out tokens
    python examples/stable_pretraining_beit.py tokens PHOTOS
"""

import sys

import timm
import torch
from torch import nn
from torchvision.transforms.v2.functional import normalize

from clustermim import DataOptions, Tokenizer, load_tokenizer, make_loader, open_source


def make_encoder(tokenizer: Tokenizer, name: str = "vit_tiny_patch16_224", **kwargs: object) -> nn.Module:
    """A timm ViT for the tokenizer's images, which takes mean and std off by itself."""
    encoder = timm.create_model(
        name, num_classes=0, img_size=tokenizer.image_size, patch_size=tokenizer.patch_size, **kwargs
    )
    mean, std = encoder.pretrained_cfg["mean"], encoder.pretrained_cfg["std"]
    encoder.patch_embed.register_forward_pre_hook(lambda _, inputs: (normalize(inputs[0], mean, std),))
    return encoder


def make_beit(tokenizer: Tokenizer, encoder: nn.Module, mask_ratio: float = 0.4) -> nn.Module:
    """stable-pretraining's BEiT, which predicts our tokens."""
    from stable_pretraining.methods.beit import BEiT

    return BEiT(
        encoder,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        patch_size=tokenizer.patch_size,
        image_size=tokenizer.image_size[0],
        mask_ratio=mask_ratio,
    )


def train(beit: nn.Module, tokenizer: Tokenizer, data: str, epochs: int = 1, batch_size: int = 64) -> list[float]:
    """A plain training loop; with stable-pretraining's own trainer the images must come in [0, 1] just the same."""
    source = open_source(data, tokenizer.fill_options(DataOptions()))
    loader = make_loader(source, batch_size=batch_size, train=True)
    optimiser = torch.optim.AdamW((p for p in beit.parameters() if p.requires_grad), lr=5e-4, weight_decay=0.05)
    losses = []
    beit.train()
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            loss = beit(batch.images).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss))
    return losses


if __name__ == "__main__":
    tokens = load_tokenizer(sys.argv[1])
    model = make_beit(tokens, make_encoder(tokens))
    history = train(model, tokens, sys.argv[2])
    print(
        f"cross-entropy of the hidden tokens: {history[0]:.3f} at first, {history[-1]:.3f} after {len(history)} steps"
    )
