"""The same policy on faster kernels: what the step gains without a change of its mathematics.

Losses differ from LeRobot's by rounding alone (tests/end_to_end/test_parity.py). Measured on two CPU cores, an ACT step at
240x320: float32 0.65 -> 0.57 s, bfloat16 0.40 -> 0.29 s; at 96x128 and half as wide: bfloat16 0.18 -> 0.14 s.
"""

from collections.abc import Callable

import torch
from lerobot.policies import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_IMAGES, OBS_STATE
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.ops import FrozenBatchNorm2d

from ray_jobs.policies.facts import facts_of


def speed_up(policy: nn.Module) -> None:
    """Let convolutions read channel by channel where pixels lie together, and take frozen norms into them.

    Parameters stay the objects they were and keep their names: optimizers and checkpoints see no difference.
    Not for FSDP, which shards rows of weights.
    """
    policy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's overloads
    for block in policy.modules():
        children = list(block.named_children())
        for (name, conv), (norm_name, norm) in zip(children, children[1:], strict=False):
            if type(conv) is nn.Conv2d and type(norm) is FrozenBatchNorm2d and conv.bias is None:
                absorbed = AbsorbedNorm(norm)
                setattr(block, name, ConvWithNorm(conv, absorbed))
                setattr(block, norm_name, absorbed)


class AbsorbedNorm(FrozenBatchNorm2d):
    """A frozen norm whose work the convolution before it does."""

    def __init__(self, norm: FrozenBatchNorm2d):
        super().__init__(len(norm.weight), norm.eps)
        self.load_state_dict(norm.state_dict())
        self.to(norm.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class ConvWithNorm(nn.Conv2d):
    """A convolution and the frozen norm behind it, as one: `s * (w @ x) + b` is `(s * w) @ x + b`.

    A frozen norm is two passes over every feature map, and under autocast it makes them float32 again; ACT's
    ResNet has 20 of them. Weights are scaled in each step, so that their gradients are those of the weights alone. On
    CPUs, where a weight is larger than what it is applied to (the last layers), the output is scaled instead.
    """

    def __init__(self, conv: nn.Conv2d, norm: AbsorbedNorm):
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        super().__init__(*shape, conv.dilation, conv.groups, False, conv.padding_mode, device="meta")  # type: ignore[arg-type]  # torch says tuple[int, ...] of pairs
        self.weight = conv.weight
        self._norm = (norm,)  # in a tuple: its buffers are saved under the name they have always had
        if self.weight.device.type == "cpu":
            # There, torch's convolution turns gradients of weights that lie otherwise, and its fused Adam copies them.
            self.weight.data = self.weight.data.clone(memory_format=torch.contiguous_format)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self._norm[0]
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if x.device.type == "cpu" and x.numel() < self.weight.numel():
            # To turn a weight's gradient costs more than channel by channel saves on few pixels.
            out = self._conv_forward(x.contiguous(), self.weight, None)
            return torch.addcmul(bias[:, None, None], out, scale[:, None, None])
        x = x.contiguous(memory_format=torch.channels_last)
        return self._conv_forward(x, self.weight * scale[:, None, None, None], bias)


def drop_quickly(policy: nn.Module) -> None:
    """Let a policy that trains on CPUs draw its dropout with other random numbers, four times as fast.

    torch draws 64 bits for each value, on one thread. Not for a training that is `lerobot-train`'s number by number:
    one in float32, on images as they are.
    """
    for module in list(policy.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout and child.p < 0.99:
                setattr(module, name, QuickDropout(child.p))


class QuickDropout(nn.Dropout):
    """Dropout by 16 bits for each value: its probability is rounded to 1/65536."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.p:
            return x
        dropped = round(self.p * 2**16)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        keep = bits[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Adam's fused kernel (its losses are equal to the last digit).

    Chosen per parameter group, after a checkpoint was loaded: LeRobot's optimizer configs have no field for it, and
    its loader refuses groups that differ from those it saved.
    """
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one, too
        return
    for group in optimizer.param_groups:
        group["fused"] = True
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            value = value.to(parameter.device)
            # The fused kernel walks memory: the moments must lie as their parameter does.
            like = torch.empty_like(parameter) if value.shape == parameter.shape else value
            state[name] = like.copy_(value) if like is not value else value


def launch_as_one(policy: nn.Module, need: int, room: float) -> None:
    """Have a GPU run ACT's forward pass and its backward pass as one launch each: CUDA graphs.

    A step of ACT is some twelve hundred small kernels, and the GPU waits for Python to launch them one by one: on an
    H100 the published recipe (240x320, batch 8) took 55 ms, 6 of them computing; with graphs it takes 16, in mixed
    precision 15 for 69. They are recorded in the first step, and what is replayed is the same kernels with the same
    random numbers: losses are equal to the last digit. A batch of another shape (the last of an epoch) goes the
    usual way, and so does validation.

    For one worker and one batch per step: the gradients of two batches would share their memory. While they are
    recorded, no other thread may use the GPU. Without a VAE, ACT copies from the CPU in its forward pass, which cannot
    be recorded.

    Args:
        need: Bytes that the training takes, by estimate. Graphs have memory of their own, beside what the batches
            that go the usual way take.
        room: Bytes of the GPU that it may take.
    """
    if not isinstance(policy, PreTrainedPolicy) or policy.config.device != "cuda":
        return
    field = facts_of(policy.config.type).graphed_field
    if not (field and getattr(policy.config, field)) or room < 3 * need:
        return
    network, eager = policy.model, policy.model.forward
    replay, recorded = None, []

    def forward(batch: dict) -> tuple:
        nonlocal replay, recorded
        names = (OBS_IMAGES, OBS_STATE, OBS_ENV_STATE, ACTION, "action_is_pad")
        read = {name: batch[name] for name in names if name in batch}
        if not network.training:
            return eager(read)
        shapes = [tensor.shape for tensor in tree_leaves(read)]
        if replay is None:
            replay, recorded = _record(network, read), shapes
            network.forward = forward
        return (replay if shapes == recorded else eager)(read)

    network.forward = forward


def _record(network: nn.Module, batch: dict) -> Callable:
    """The network's forward pass on batches like this one, as a graph; random numbers are as they were before."""
    device = batch[ACTION].device
    random = torch.cuda.get_rng_state(device)
    del network.forward  # not ours, but its own
    autocast = torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), autocast, cache_enabled=False):
        torch.cuda.make_graphed_callables(network, (tree_map(torch.clone, batch),), allow_unused_input=True)
    torch.cuda.set_rng_state(random, device)
    return network.forward
