"""Faster kernels: the same mathematics."""

import copy

import pytest
import torch
from torch.nn.functional import mse_loss
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from ray_jobs.policies.kernels import drop_quickly, fuse, speed_up


def backbone() -> torch.nn.Module:
    """ACT's, with norms as a trained one has them."""
    torch.manual_seed(0)
    model = resnet18(norm_layer=FrozenBatchNorm2d)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for name, low, high in (
                ("weight", 0.5, 1.5),
                ("bias", -1, 1),
                ("running_mean", -1, 1),
                ("running_var", 0.5, 2),
            ):
                getattr(module, name).uniform_(low, high)
    return model


def test_frozen_norms_in_their_convolutions():
    """Outputs, gradients, names and three steps of Adam as torchvision's own modules and torch's plain Adam have them."""
    plain = backbone()
    fast = copy.deepcopy(plain)
    speed_up(fast)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert sum(type(m) is FrozenBatchNorm2d for m in fast.modules()) == 0
    images, wanted = torch.rand(2, 3, 128, 128), torch.rand(2, 1000)
    adams = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (plain, fast)]
    for step in range(3):
        losses = []
        for model, adam in zip((plain, fast), adams, strict=True):
            if model is fast and step == 1:
                fuse(adam)  # as after a resume: its moments are those of the plain one
            loss = mse_loss(model(images), wanted)
            adam.zero_grad()
            loss.backward()
            losses.append(loss.item())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
        for (name, theirs), ours in zip(plain.named_parameters(), fast.parameters(), strict=True):
            difference = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
            assert difference < 1e-4, name
            # Adam's fused kernel walks memory: a gradient must lie as its weight does.
            assert ours.is_contiguous() and ours.grad.is_contiguous(), name
        for adam in adams:
            adam.step()


def test_dropout_of_mixed_precision():
    """A tenth of the values, wherever they lie, the others scaled; gradients likewise; again with the same seed."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, dropout=0.1)
    drop_quickly(layer)
    x = torch.ones(501, 403, requires_grad=True)
    torch.manual_seed(3)
    y = layer.dropout1(x)
    y.sum().backward()
    assert torch.equal(x.grad, y) and sorted(y.unique().tolist()) == [0, pytest.approx(1 / 0.9, 1e-4)]
    for part in (y, y[:, ::7], y[::5]):
        assert (part == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    torch.manual_seed(3)
    assert torch.equal(layer.dropout1(x), y) and not torch.equal(layer.dropout1(x), y)
    assert layer.eval().dropout1(x) is x
