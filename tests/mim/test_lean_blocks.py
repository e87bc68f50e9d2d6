"""Lean blocks against timm's own: outputs and every gradient, in 64, 32 and 16 bits."""

import copy

import pytest
import torch
from timm.models.vision_transformer import Block

from clustermim.mim.crossing import CrossBlock
from clustermim.mim.last_block import LastBlock
from clustermim.mim.lean_blocks import LeanBlock, LeanCrossBlock, LeanLastBlock, make_lean


def shaken(block):
    """The block with noise on every parameter, so that none is zero or one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def pair(dtype=torch.float32, **options):
    block = shaken(Block(24, 3, qkv_bias=True, **options).to(dtype))
    lean = copy.deepcopy(block)
    assert make_lean(lean) == 1
    assert isinstance(lean, LeanBlock)
    return block, lean


def results(block, x, autocast=False, of=None):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = block(x)
    out.float().square().mean().backward()
    return [out.detach(), x.grad, *(p.grad for p in (of or block).parameters())]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("batch", [1, 6, 9])
def test_output_and_every_gradient_are_timms(dtype, tolerance, batch):
    block, lean = pair(dtype)
    x = torch.randn(batch, 7, 24, dtype=dtype)
    for one, two in zip(results(block, x), results(lean, x), strict=True):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def last_pair(dtype):
    """A `LastBlock` and its lean twin with the weights of a timm block."""
    block, _ = pair(dtype)
    last = LastBlock(24, 3, qkv_bias=True).to(dtype)
    last.load_state_dict(block.state_dict())
    lean = copy.deepcopy(last)
    assert make_lean(lean) == 1
    assert isinstance(lean, LeanLastBlock)
    return block, last, lean


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("start", [0, 1, 4, 6])
@pytest.mark.parametrize("fused", [True, False])
def test_the_last_block_is_the_end_of_timms(dtype, tolerance, start, fused):
    block, last, lean = last_pair(dtype)
    last.attn.fused_attn = fused
    x = torch.randn(5, 7, 24, dtype=dtype)
    wanted = results(lambda x: block(x)[:, start:], x, of=block)
    for other in (last, lean):
        for one, two in zip(wanted, results(lambda x, o=other: o(x, start), x, of=other), strict=True):
            torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def test_the_lean_last_block_in_bf16_is_as_near_to_the_truth_as_the_other():
    _, last, lean = last_pair(torch.float32)
    x = torch.randn(6, 7, 24)
    exact = results(lambda x: last(x, 3), x, of=last)
    last.zero_grad()
    theirs = results(lambda x: last(x, 3), x, True, of=last)
    for truth, plain, ours in zip(exact, theirs, results(lambda x: lean(x, 3), x, True, of=lean), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - truth).norm() <= 1.5 * (plain.float() - truth).norm() + 1e-3 * truth.norm()


def cross_pair(dtype=torch.float32):
    block = shaken(CrossBlock(24, 3).to(dtype))
    lean = copy.deepcopy(block)
    assert make_lean(lean) == 1
    assert isinstance(lean, LeanCrossBlock)
    return block, lean


def cross_results(block, autocast=False, dtype=torch.float32):
    """Output and all gradients, that of the context too."""
    draw = torch.Generator().manual_seed(2)
    context = torch.randn(5, 7, 24, dtype=dtype, generator=draw).requires_grad_()
    x = torch.randn(5, 4, 24, dtype=dtype, generator=draw)
    return [*results(lambda x: block(x, context), x, autocast, of=block), context.grad]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_cross_attention_and_every_gradient(dtype, tolerance):
    block, lean = cross_pair(dtype)
    for one, two in zip(cross_results(block, dtype=dtype), cross_results(lean, dtype=dtype), strict=True):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        x = torch.randn(2, 3, 24, dtype=dtype)
        assert torch.equal(block(x, x), lean(x, x))


def test_cross_attention_in_bf16_is_as_near_to_the_truth():
    block, lean = cross_pair()
    exact = cross_results(block)
    block.zero_grad()
    for truth, plain, ours in zip(exact, cross_results(block, True), cross_results(lean, True), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - truth).norm() <= 1.5 * (plain.float() - truth).norm() + 1e-3 * truth.norm()


def test_in_bf16_it_is_as_near_to_the_truth_as_timms():
    block, lean = pair()
    x = torch.randn(6, 7, 24)
    exact = results(block, x)
    block.zero_grad()
    for truth, theirs, ours in zip(exact, results(block, x, True), results(lean, x, True), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - truth).norm() <= 1.5 * (theirs.float() - truth).norm() + 1e-3 * truth.norm()
        assert (ours - truth).norm() <= 0.03 * truth.norm() + 1e-4


def test_frozen_parameters_and_inference():
    block, lean = pair()
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        assert torch.equal(block(x), lean(x))
    lean.requires_grad_(False)
    assert not lean(x).requires_grad


def test_other_blocks_stay_as_they_are():
    for options in ({"init_values": 0.1}, {"qk_norm": True}, {"drop_path": 0.1}, {"proj_drop": 0.1}):
        assert make_lean(Block(24, 3, qkv_bias=True, **options)) == 0
    assert make_lean(Block(24, 3, qkv_bias=False)) == 0
    assert make_lean(Block(24, 3, qkv_bias=True, act_layer=torch.nn.ReLU)) == 0
