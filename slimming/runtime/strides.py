"""A workaround for a bug of oneDNN in strided 1x1 convolutions with few input channels."""

import contextlib
from collections.abc import Iterator

from torch import nn

BLOCK = 16  # channels that oneDNN computes at a time, at most


@contextlib.contextmanager
def unit_strides(model: nn.Module) -> Iterator[None]:
    """Inside the context, strided 1x1 convolutions subsample their input and run at stride 1, with
    the same outputs and gradients.

    If such a convolution on the CPU reads fewer channels than a block, as after pruning, oneDNN's
    backward pass writes out of bounds and may crash (uxlfoundation/oneDNN issue 6035).
    """
    undo = []
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and _is_at_risk(conv):
            rows, columns = conv.stride
            hook = conv.register_forward_pre_hook(
                lambda _, inputs, r=rows, c=columns: (inputs[0][..., ::r, ::c],)
            )
            undo.append((conv, conv.stride, hook))
            conv.stride = (1, 1)
    try:
        yield
    finally:
        for conv, stride, hook in undo:
            conv.stride = stride
            hook.remove()


def _is_at_risk(conv: nn.Conv2d) -> bool:
    plain = conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    few = conv.in_channels < BLOCK and conv.weight.device.type == "cpu"
    return plain and few and conv.stride != (1, 1)
