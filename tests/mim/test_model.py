"""The model against transformers' ViTMAE and against timm, and what it may and may not see."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.data.masks import part_of_masks, random_masks
from clustermim.encoders.keymaps import from_mae_layout
from clustermim.errors import InputError
from clustermim.mim.building import build_model
from clustermim.mim.crossing import CrossBlock
from clustermim.mim.selecting import split_mask, take_rows
from clustermim.mim.targets import PixelTarget

SHAPES = [((8, 8), 1, 2), ((8, 12), 4, 4), ((12, 8), 3, 2)]


def tiny(size=(8, 8), channels=1, patch=2, output_dim=5, seed=0, **options):
    mean, std = [0.4] * channels, [0.3] * channels
    options = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2} | options
    return build_model(
        "vit_micro", image_size=size, patch_size=patch, channels=channels, output_dim=output_dim,
        mean=mean, std=std, seed=seed, **options,
    )[0]  # fmt: skip


@pytest.mark.parametrize(("size", "channels", "patch"), SHAPES)
def test_shapes_and_agreement_with_timm(size, channels, patch):
    model = tiny(size, channels, patch)
    images = torch.rand(3, channels, *size)
    mask = random_masks(0, 0, torch.arange(3), model.num_patches, 0.5)
    assert model(images, mask).shape == (3, int(mask[0].sum()), 5)
    everything = torch.arange(model.num_patches).expand(3, -1)
    with torch.no_grad():
        ours = model.encode(images, everything)
        theirs = model.encoder.forward_features((images - 0.4) / 0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@given(st.integers(2, 30), st.integers(1, 4), st.integers(0, 99), st.floats(0.05, 0.95))
@settings(deadline=None, max_examples=25)
def test_split_mask_is_exact(patches, batch, seed, ratio):
    if not 1 <= round(patches * ratio) < patches:
        return
    mask = random_masks(seed, 1, torch.arange(batch), patches, ratio)
    visible, hidden = split_mask(mask)
    for row in range(batch):
        assert hidden[row].tolist() == mask[row].nonzero().flatten().tolist()
        assert visible[row].tolist() == (~mask[row]).nonzero().flatten().tolist()
    values = torch.rand(batch, patches, 3)
    assert torch.equal(take_rows(values, hidden), values[mask].view(batch, -1, 3))


KINDS = [{}, {"decoder": "cross"}, {"encoder": "full"}]


def any_kind(kind, size=(8, 12), channels=3, patch=2, **options):
    sizes = {} if kind.get("encoder") == "full" else {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2}
    return build_model(
        "vit_micro", image_size=size, patch_size=patch, channels=channels, output_dim=5,
        mean=[0.4] * channels, std=[0.3] * channels, **kind, **sizes, **options,
    )[0]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "channels", "patch"), SHAPES)
def test_every_architecture_predicts_and_learns_without_a_leak(kind, size, channels, patch):
    model = any_kind(kind, size, channels, patch)
    images = torch.rand(3, channels, *size)
    mask = random_masks(0, 0, torch.arange(3), model.num_patches, 0.5)
    pixels = mask.view(3, 1, *model.grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    found = model(images, mask)
    assert found.shape == (3, int(mask[0].sum()), 5)
    assert torch.equal(found, model(torch.where(pixels, torch.rand_like(images), images), mask))
    assert not torch.equal(found, model(torch.where(pixels, images, torch.rand_like(images)), mask))
    found.square().sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    again = any_kind(kind, size, channels, patch, seed=9)
    again.load_mae_state(model.mae_state())
    assert torch.equal(found, again(images, mask))


@pytest.mark.parametrize("kind", [{"decoder": "cross"}, {"encoder": "full"}])
def test_a_part_of_the_predictions_is_that_part(kind):
    model = any_kind(kind)
    images, index = torch.rand(3, 3, 8, 12), torch.arange(3)
    mask = random_masks(0, 0, index, model.num_patches, 0.5)
    asked = part_of_masks(0, 0, index, mask, 5)
    assert not bool((asked & ~mask).any())
    everything, part = model(images, mask), model(images, mask, None, asked)
    chosen = asked[mask].view(3, -1)
    torch.testing.assert_close(part, everything[chosen].view(3, 5, 5), atol=1e-6, rtol=1e-5)


def test_the_full_encoder_is_timms_with_mask_tokens():
    model = any_kind({"encoder": "full"})
    images = torch.rand(2, 3, 8, 12)
    mask = random_masks(0, 0, torch.arange(2), model.num_patches, 0.4)
    encoder = model.encoder
    tokens = encoder.patch_embed((images - 0.4) / 0.3)
    tokens = torch.where(mask[..., None], model.mask_token, tokens)
    tokens = torch.cat([encoder.cls_token.expand(2, -1, -1), tokens], 1) + encoder.pos_embed
    expected = model.decoder_pred(encoder.norm(encoder.blocks(tokens))[:, 1:])[mask].view(2, -1, 5)
    torch.testing.assert_close(model(images, mask), expected, atol=1e-5, rtol=1e-4)


def test_cross_decoder_is_attention_written_out():
    block = CrossBlock(12, 3)
    queries, context = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    q = block.q(block.norm1(queries)).view(2, 5, 3, 4)
    k, v = (part.reshape(2, 7, 3, 4) for part in block.kv(block.norm_context(context)).chunk(2, -1))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(2.0).softmax(-1)
    after = queries + block.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
    expected = after + block.mlp(block.norm2(after))
    torch.testing.assert_close(block(queries, context), expected, atol=1e-5, rtol=1e-4)


def test_a_full_encoder_has_no_decoder_to_size():
    with pytest.raises(InputError, match="--encoder full has no decoder"):
        any_kind({"encoder": "full", "decoder_dim": 16})
    with pytest.raises(InputError, match="--encoder full has no decoder"):
        any_kind({"encoder": "full", "decoder": "cross"})


def test_unequal_masks_are_refused():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    with pytest.raises(InputError, match="different numbers"):
        split_mask(mask)


def test_hidden_pixels_do_not_leak():
    model = tiny((8, 12), 3, 2)
    images = torch.rand(2, 3, 8, 12)
    mask = random_masks(0, 0, torch.arange(2), model.num_patches, 0.75)
    pixels = mask.view(2, 1, *model.grid).repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.no_grad():
        before = model(images, mask)
        assert torch.equal(before, model(torch.where(pixels, torch.rand_like(images), images), mask))
        assert not torch.equal(before, model(torch.where(pixels, images, torch.rand_like(images)), mask))


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, two, other = tiny(seed=3), tiny(seed=3), tiny(seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.decoder_pred.weight, other.decoder_pred.weight)
    assert not one.encoder.pos_embed.requires_grad
    assert not one.decoder_pos_embed.requires_grad


def test_mae_layout_round_trip():
    one, two = tiny(seed=1), tiny(seed=2)
    state = one.mae_state()
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "mask_token"} <= set(state)
    assert set(from_mae_layout(state)) == set(one.state_dict())
    two.load_mae_state(state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    state.pop("decoder_pred.bias")
    with pytest.raises(InputError, match=r"decoder_pred\.bias"):
        two.load_mae_state(state)


def test_a_wrong_encoder_is_refused():
    from clustermim.mim.model import MaskedImageModel

    with pytest.raises(InputError, match="VisionTransformer"):
        MaskedImageModel(torch.nn.Linear(2, 2), 4, decoder_dim=8, decoder_depth=1, decoder_heads=2, mean=[0], std=[1])
    with pytest.raises(InputError, match="heads"):
        tiny(decoder_dim=30, decoder_heads=4)
    with pytest.raises(InputError, match="0 blocks"):
        tiny(decoder_depth=0)
    with pytest.raises(InputError, match="divide"):
        tiny(patch=3)
    with pytest.raises(InputError, match="vit_micro"):
        build_model(
            "vit_mikro", image_size=8, patch_size=2, channels=1, output_dim=4, mean=[0.0], std=[1.0]
        )  # fmt: skip


def from_transformers(state, depth, decoder_depth):
    """The weights of transformers' ViTMAE under MAE's own names."""
    found = {
        "cls_token": state["vit.embeddings.cls_token"],
        "pos_embed": state["vit.embeddings.position_embeddings"],
        "mask_token": state["decoder.mask_token"],
        "decoder_pos_embed": state["decoder.decoder_pos_embed"],
    }
    pairs = {
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "decoder_embed": "decoder.decoder_embed",
        "decoder_norm": "decoder.decoder_norm",
        "decoder_pred": "decoder.decoder_pred",
    }
    for ours, theirs, count in (
        ("blocks", "vit.layers", depth),
        ("decoder_blocks", "decoder.decoder_layers", decoder_depth),
    ):
        for i in range(count):
            pairs |= {
                f"{ours}.{i}.norm1": f"{theirs}.{i}.layernorm_before",
                f"{ours}.{i}.norm2": f"{theirs}.{i}.layernorm_after",
                f"{ours}.{i}.attn.proj": f"{theirs}.{i}.attention.o_proj",
                f"{ours}.{i}.mlp.fc1": f"{theirs}.{i}.mlp.fc1",
                f"{ours}.{i}.mlp.fc2": f"{theirs}.{i}.mlp.fc2",
            }
            for kind in ("weight", "bias"):
                parts = [state[f"{theirs}.{i}.attention.{x}_proj.{kind}"] for x in "qkv"]
                found[f"{ours}.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    for ours, theirs in pairs.items():
        found |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return found


@pytest.mark.parametrize("norm_pix", [True, False])
def test_same_loss_and_gradient_as_transformers(norm_pix):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    config = ViTMAEConfig(
        image_size=16, patch_size=4, num_channels=3, hidden_size=128, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=512, decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=256, mask_ratio=0.75, norm_pix_loss=norm_pix, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = ViTMAEForPreTraining(config).eval()
    model = tiny((16, 16), 3, 4, 48, decoder_dim=64, decoder_depth=2, decoder_heads=4)
    model.load_mae_state(from_transformers(theirs.state_dict(), 6, 2))

    images = torch.rand(4, 3, 16, 16)
    mask = random_masks(5, 0, torch.arange(4), 16, 0.75)
    noise = mask.float() + 0.5 * torch.rand(4, 16)  # the lowest stay visible
    expected = theirs((images - 0.4) / 0.3, noise=noise)
    assert torch.equal(expected.mask.bool(), mask)
    target = PixelTarget(4, [0.4] * 3, [0.3] * 3, norm_pix)
    predictions = model(images, mask)
    loss = target(predictions, images, mask).loss
    torch.testing.assert_close(predictions, expected.logits[mask].view(4, 12, 48), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)

    loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(
        model.encoder.patch_embed.proj.weight.grad,
        theirs.vit.embeddings.patch_embeddings.projection.weight.grad,
        atol=1e-5,
        rtol=1e-4,
    )


def test_a_stock_timm_model_will_do():
    model, spec = build_model(
        "vit_tiny_patch16_224",
        image_size=(16, 32),
        patch_size=8,
        channels=2,
        output_dim=7,
        mean=[0.5] * 2,
        std=[0.2] * 2,
    )
    rebuilt = timm.create_model(spec["name"], **spec["kwargs"], num_classes=0)
    rebuilt.load_state_dict(model.encoder.state_dict())
    mask = random_masks(0, 0, torch.arange(2), 8, 0.75)
    assert model(torch.rand(2, 2, 16, 32), mask).shape == (2, 6, 7)


@pytest.mark.parametrize("kind", ["self", "cross", "full"])
def test_activation_checkpointing_changes_memory_only(kind):
    """The same loss and the same gradients, from fewer tensors kept."""
    sizes = {"decoder": kind, "decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
    more = {"encoder": "full"} if kind == "full" else sizes
    model, _ = build_model(
        "vit_micro", image_size=16, patch_size=4, channels=3, output_dim=5, mean=[0.5] * 3, std=[0.3] * 3, **more
    )
    images, mask = torch.rand(4, 3, 16, 16), torch.zeros(4, 16, dtype=torch.bool)
    mask[:, ::2] = True
    found, kept = {}, {}
    for again in (False, True):
        model.encoder.set_grad_checkpointing(again)
        model.zero_grad()
        kept[again] = 0

        def keep(tensor, again=again):
            kept[again] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(images, mask).square().mean()
        loss.backward()
        found[again] = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert len(found[True]) == len(found[False]) > 50
    for one, other in zip(found[True], found[False], strict=True):
        assert torch.equal(one, other)
    assert kept[True] < 0.5 * kept[False]
