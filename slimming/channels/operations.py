"""What each operation does to labels: one entry for each kind.

A rule is a function of the trace and of a call that has run; it returns the labels of the outputs,
and ties or pins those that it reads. `rule` adds one, for an operation of one's own too:

    @rule("mylib::double_channels")
    def double_channels(trace, call):
        labels = trace.of(call.args[0])
        return torch.cat([labels, labels], 1)
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from slimming.channels.labels import (
    Call,
    Labels,
    Rule,
    Rules,
    Split,
    Trace,
    compact,
    labelled,
    varied,
    varies,
)

RULES: dict[str, Rule] = {}


Function = TypeVar("Function", bound=Rule)


def rule(*names: str) -> Callable[[Function], Function]:
    """Register a rule for operations of ATen by their names, or 'namespace::name' for others."""

    def register(function: Function) -> Function:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def rule_of(call: Call) -> Rule:
    """The rule for a call: its own, that of all pointwise operations, or `unknown`."""
    if call.name in RULES:
        return RULES[call.name]
    return pointwise if torch.Tag.pointwise in getattr(call.func, "tags", ()) else unknown


def unknown(trace: Trace, call: Call) -> Labels:
    """What no rule knows pins what it reads."""
    _pinned(trace, call.tensors, call.name)
    return None


def _pinned(trace: Trace, tensors: Iterable[torch.Tensor], why: str) -> None:
    for tensor in tensors:
        if trace.is_weight(tensor):
            for dim in range(tensor.dim()):
                trace.pin(trace.axis(tensor, dim), why)
        else:
            trace.pin(trace.of(tensor), why)


# --- operations that move data


def view(trace: Trace, call: Call) -> None:
    """A view of a tensor has the same view of its labels; so has what returns its argument."""
    source = call.tensors[0]
    if trace.is_weight(source) and call.name in PERMUTATIONS:
        order = _order(call, source)
        name, dims = trace.name(source), trace.dims(source)
        assert name is not None
        trace.weigh(call.outputs[0], name, tuple(dims[d] for d in order))
        return
    labels = trace.of(source)
    if not labelled(labels):
        return
    moved = _viewed(trace, call, labels)
    for tensor, own in zip(call.outputs, moved, strict=True):
        trace.put(tensor, own)
    if call.name in PARTS:
        _part(trace, call, labels)
    elif len(moved) == 1 and moved[0] is not None:
        _split_dims(trace, call, labels, trace.of(call.outputs[0]))


PERMUTATIONS = {"t", "transpose", "permute", "detach", "alias", "numpy_T"}
PARTS = {
    "split",
    "split_with_sizes",
    "chunk",
    "slice",
    "narrow",
    "select",
    "unbind",
    "tensor_split",
}


def _order(call: Call, tensor: torch.Tensor) -> list[int]:
    """The dimensions of ``tensor`` in the order of the output."""
    order = list(range(tensor.dim()))
    if call.name == "permute":
        return [d % tensor.dim() for d in call.args[1]]
    if call.name in ("t", "numpy_T"):
        return order[::-1]
    if call.name == "transpose":
        a, b = call.args[1], call.args[2]
        order[a], order[b] = order[b], order[a]
    return order


def _viewed(trace: Trace, call: Call, labels: torch.Tensor) -> list[Labels]:
    if call.outputs[0].shape == labels.shape and call.name not in PERMUTATIONS | {"as_strided"}:
        return [labels] * len(call.outputs)
    if call.name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten"):
        return [labels.reshape(call.outputs[0].shape)]
    source = call.tensors[0]
    if call.name == "as_strided" and not (source.is_contiguous() and source.storage_offset() == 0):
        trace.pin(labels, call.name)
        return [None]
    if call.name == "as_strided":
        labels = labels.contiguous()
    try:
        moved = call.func(labels, *call.args[1:], **call.kwargs)
    except (RuntimeError, TypeError):
        trace.pin(labels, call.name)
        return [None] * len(call.outputs)
    return list(moved) if isinstance(moved, (list, tuple)) else [moved]


def _part(trace: Trace, call: Call, labels: torch.Tensor) -> None:
    """Parts of a dimension with labels: equal parts lose equal positions, and the code may hold
    their size. One part alone is taken at positions that the code holds, and is pinned."""
    default = 0 if call.name in ("unbind", "slice") else None
    place = {"split": 2, "split_with_sizes": 2, "tensor_split": 2, "chunk": 2}.get(call.name, 1)
    dim = call.kwargs.get("dim", call.arg(place, default if default is not None else 0))
    dim %= labels.dim()
    if not varies(labels, dim):
        return
    parts = [trace.of(t) for t in call.outputs]
    if len(parts) == 1 and call.name in ("slice", "narrow", "select"):
        if call.outputs[0].shape != labels.shape:
            trace.pin(labels, f"a part that starts at a fixed position ({call.name})")
        return
    if call.name == "unbind":
        trace.tie(*parts)
        return
    by_size: dict[int, list[torch.Tensor]] = {}
    for part in parts:
        by_size.setdefault(part.shape[dim], []).append(part)
    if call.name != "split_with_sizes" and len(by_size) > 1:  # of fewer, cut elsewhere
        trace.pin(labels, f"unequal parts ({call.name})")
        return
    for size, equal in by_size.items():
        trace.tie(*equal)
        trace.size(size, trace.along(equal[0], dim))
    trace.size(labels.shape[dim], trace.along(labels, dim))


def _split_dims(trace: Trace, call: Call, before: torch.Tensor, after: torch.Tensor) -> None:
    """Remember where one dimension with labels became several."""
    dims, old = varied(after), varied(before)
    if len(dims) > len(old):
        sizes = call.arg(1) if call.name in ("view", "_unsafe_view") else []
        open_ = sizes.index(-1) if -1 in sizes else None
        trace.splits.append(Split(trace.module, after, dims, open_ if open_ in dims else None))
    if len(dims) != len(old):
        for labels in (before, after):
            for dim in varied(labels) if len(varied(labels)) == 1 else []:
                trace.size(labels.shape[dim], trace.along(labels, dim))


@rule("clone", "_to_copy", "lift_fresh", "lift_fresh_copy", "contiguous", "detach", "alias")
@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "bernoulli")
@rule("native_dropout", "dropout", "_conj_physical", "flip", "randint_like")
def same(trace: Trace, call: Call) -> Labels:
    """The labels of the argument, where it has the same shape."""
    labels = trace.of(call.tensors[0])
    return call.func(labels, *call.args[1:]) if call.name == "flip" else labels


@rule("cat", "stack")
def joined(trace: Trace, call: Call) -> list[Labels]:
    """One after the other along a dimension; along all others they have the same positions."""
    operands = [trace.of(t) for t in call.args[0] if t.numel()]
    if call.name == "cat":
        dim = call.kwargs.get("dim", call.arg(1, 0))
        along = [o for o in operands if varies(o, dim)]
        across = [o.narrow(dim, 0, 1) for o in operands if not varies(o, dim)]
        if along and any(len(varied(o)) > 1 for o in along) | any(varied(o) for o in across):
            _pinned(trace, call.args[0], "positions of other channels")
        operands = [] if along else across
    tied = _same_positions(trace, operands)
    if tied is not None and call.name == "cat" and len(operands) == len(call.args[0]):
        return [tied.expand(call.outputs[0].shape)]  # as a class token before all others
    return _on_labels(trace, call, *call.args, **call.kwargs)


def _same_positions(trace: Trace, operands: list[torch.Tensor]) -> Labels:
    """Tie what has the same positions; pin what is the same for all channels of another one. The
    labels that all have then, if they do."""
    dims = {d for labels in operands for d in varied(labels)}
    known = [labels for labels in operands if dims and labelled(labels)]
    full = [labels for labels in known if dims == set(varied(labels))]
    for labels in known:
        if len({o.shape for o in known}) > 1 or all(labels is not o for o in full):
            trace.pin(labels, "positions of other channels")
    if len({o.shape for o in full}) != 1:
        return None
    trace.tie(*full)
    return full[0] if len(full) == len(operands) else None


@rule("repeat", "constant_pad_nd", "tile", "squeeze_copy", "unsqueeze_copy")
@rule("im2col", "expand_copy", "permute_copy", "transpose_copy", "view_copy", "slice_backward")
@rule("pixel_unshuffle", "tril", "triu", "_unsafe_view", "unfold_copy", "diagonal_copy")
def moved(trace: Trace, call: Call) -> list[Labels]:
    """The same operation on labels."""
    if call.name == "constant_pad_nd":
        return _on_labels(trace, call, call.args[0], call.args[1])
    if call.name == "_unsafe_view":
        labels = trace.of(call.args[0])
        after = compact(labels.reshape(call.outputs[0].shape))
        _split_dims(trace, call, labels, after)
        return [after]
    return _on_labels(trace, call, *call.args, **call.kwargs)


def _on_labels(trace: Trace, call: Call, *args: Any, **kwargs: Any) -> list[Labels]:
    """What the operation returns for labels in place of floats."""
    in_place = call.func.name().partition(".")[0].endswith("_")  # labels that are stored once, too

    def labels_of(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(labels_of, value))
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            return trace.of(value).clone() if in_place else trace.of(value)
        return value

    kwargs = {k: v for k, v in kwargs.items() if k not in ("dtype", "memory_format", "layout")}
    found = call.func(*map(labels_of, args), **{k: labels_of(v) for k, v in kwargs.items()})
    return list(found) if isinstance(found, (list, tuple)) else [found]


@rule("index", "index_select", "gather", "take_along_dim", "masked_select", "_unsafe_index")
@rule("roll", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d")
@rule("replication_pad2d", "replication_pad3d", "index_put", "scatter", "slice_scatter")
@rule(
    "select_scatter",
    "index_copy",
    "index_add",
    "scatter_add",
    "repeat_interleave",
    "masked_scatter",
)
def picked(trace: Trace, call: Call) -> list[Labels]:
    """Positions that are computed or in the code: the labels along these dimensions stay."""
    for tensor in call.tensors:
        labels = trace.of(tensor)
        values = call.name == "index_put" and tensor is call.args[2]
        dims = _written_dims(call, labels) if values else _picked_dims(call, labels)
        if any(varies(labels, d) for d in dims):
            trace.pin(labels, call.name)
    if call.name == "masked_select":
        return [None]
    if call.name in ("gather", "scatter", "scatter_add"):
        operands = [trace.of(t) for t in call.tensors if t.dim()]
        _same_positions(trace, [o.narrow(call.args[1], 0, 1) for o in operands])
    return _on_labels(trace, call, *call.args, **call.kwargs)


def _picked_dims(call: Call, labels: torch.Tensor) -> list[int]:
    """The dimensions in which an operation of `picked` chooses positions."""
    every = list(range(labels.dim()))
    if call.name in ("index", "_unsafe_index", "index_put"):
        chosen: list[int] = []
        for place, index in enumerate(call.args[1]):
            if index is not None:
                wide = index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
                chosen += range(place, place + wide)
        return [d for d in every if d in chosen]
    if "_pad" in call.name:
        return every[-len(call.args[1]) // 2 :]
    dims = call.arg(2 if call.name == "roll" else 1, every)
    if call.name == "repeat_interleave" and isinstance(dims, torch.Tensor | int):
        dims = call.arg(2, every)
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (list, tuple)) or not dims:
        return every
    return [d % max(1, labels.dim()) for d in dims]


def _written_dims(call: Call, values: torch.Tensor) -> list[int]:
    """The dimensions in which ``index_put`` writes its values to chosen positions; leading ones of
    size 1 may be missing."""
    places = [place for place, index in enumerate(call.args[1]) if index is not None]
    indices = [call.args[1][place] for place in places]
    masks = [index.dtype in (torch.bool, torch.uint8) for index in indices]
    wide = max(1 if mask else i.dim() for i, mask in zip(indices, masks, strict=True))
    gone = sum(i.dim() if mask else 1 for i, mask in zip(indices, masks, strict=True))
    missing = call.args[0].dim() - gone + wide - values.dim()
    start = places[0] if places[-1] - places[0] == len(places) - 1 else 0
    return [d - missing for d in range(start, start + wide) if d >= missing]


@rule("pixel_shuffle")
def pixel_shuffle(trace: Trace, call: Call) -> list[Labels]:
    """(C·r², H, W) -> (C, H·r, W·r): the r² channels of an output go together."""
    (found,) = _on_labels(trace, call, *call.args)
    assert found is not None
    rows = trace.along(compact(found), found.dim() - 3)
    return [rows.view(-1, 1, 1).expand(call.outputs[0].shape)]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(trace: Trace, call: Call) -> list[Labels]:
    """Groups of channels that are interleaved lose equal positions."""
    rows = trace.along(trace.of(call.args[0]), 1)
    _equal_parts(trace, rows, call.args[1])
    return _on_labels(trace, call, *call.args)


def _equal_parts(trace: Trace, labels: torch.Tensor, parts: int) -> None:
    """Equal parts of ``labels`` (C,) lose equal positions."""
    if parts > 1:
        of_part = labels.view(parts, -1)
        trace.tie(of_part, of_part[:1].expand_as(of_part))


@rule("col2im")
def col2im(trace: Trace, call: Call) -> Labels:
    """(N, C·k, L) -> (N, C, H, W): sums over the k positions of a channel."""
    labels, out = trace.of(call.args[0]), call.outputs[0]
    rows = trace.along(labels, labels.dim() - 2).view(out.shape[-3], -1)
    trace.tie(rows, rows[:, :1].expand_as(rows))
    return rows[:, :1, None].expand(out.shape)


@rule("glu")
def glu(trace: Trace, call: Call) -> Labels:
    """Two halves that are multiplied lose equal positions."""
    labels = trace.of(call.args[0])
    a, b = labels.chunk(2, call.arg(1, -1))
    if varies(labels, call.arg(1, -1) % labels.dim()):
        trace.tie(a, b)
    return a


# --- pooling, upsampling: each channel by itself

POOLS = """max_pool{}_with_indices avg_pool{} _adaptive_avg_pool{} adaptive_max_pool{} max_pool{}
adaptive_avg_pool{} mkldnn_max_pool{} fractional_max_pool{} upsample_nearest{} upsample_bilinear{}
_upsample_nearest_exact{} upsample_bicubic{} upsample_linear{} upsample_trilinear{} lp_pool{}
_upsample_bilinear{}_aa _upsample_bicubic{}_aa max_unpool{} _upsample_lanczos{}_aa"""


@rule(*(name.format(f"{d}d") for d in (1, 2, 3) for name in POOLS.split()))
@rule("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def spatial(trace: Trace, call: Call) -> Labels:
    """Each channel by itself: labels that vary over space are pinned."""
    if "grid_sampler" in call.name:
        trace.pin(trace.of(call.args[1]), call.name)
        space = call.args[0].dim() - 2
    else:
        space = next(d for d in (1, 2, 3) if f"{d}d" in call.name)
    if "unpool" in call.name:  # where each channel is written comes from another one
        _same_positions(trace, [trace.of(t) for t in call.tensors[:2]])
    labels, out = trace.of(call.args[0]), call.outputs[0]
    trace.reduce(labels, range(labels.dim() - space, labels.dim()), call.name)
    for dim in range(labels.dim() - space, labels.dim()):
        labels = labels.narrow(dim, 0, 1)
    return labels.expand(out.shape)


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi(trace: Trace, call: Call) -> Labels | list[Labels]:
    """(N, C, H, W) and boxes -> (K, C, h, w)."""
    trace.pin(trace.of(call.args[1]), call.name)
    rows = trace.along(trace.of(call.args[0]), 1)
    labels = rows.view(-1, 1, 1)
    return [labels.expand(t.shape) if t.dim() == 4 else None for t in call.outputs]


# --- sums over dimensions


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "norm",
    "prod",
    "any",
    "all",
)
@rule(
    "linalg_vector_norm",
    "logsumexp",
    "max",
    "min",
    "argmax",
    "argmin",
    "nansum",
    "median",
    "aminmax",
)
@rule("mode", "count_nonzero", "nanmedian")
def reduction(trace: Trace, call: Call) -> list[Labels]:
    """Free where labels do not vary along the dimensions that are reduced."""
    labels = trace.of(call.args[0])
    if len(call.tensors) > 1:  # torch.max(a, b)
        return [pointwise(trace, call)]
    place = 2 if call.name in ("norm", "linalg_vector_norm") else 1
    dims = call.kwargs.get("dim", call.arg(place))
    if dims is None or isinstance(dims, bool) or dims == []:
        dims = list(range(labels.dim()))
    dims = [d % max(1, labels.dim()) for d in ([dims] if isinstance(dims, int) else dims)]
    trace.reduce(labels, dims, call.name)
    if any(varies(labels, d) for d in dims):
        labels = compact(labels)
    found: list[Labels] = []
    for tensor in call.outputs:
        own = labels
        for dim in sorted(dims, reverse=True):
            # of tied labels any one
            own = own.amax(dim, keepdim=tensor.dim() == labels.dim()) if own.dim() else own
        found.append(own if own.shape == tensor.shape else None)
    return found


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "sort", "topk")
@rule("cummax", "cummin", "logcumsumexp", "argsort", "_safe_softmax", "softmax_")
def along_dim(trace: Trace, call: Call) -> list[Labels]:
    """Operations that mix positions along one dimension; free where labels do not vary there."""
    labels = trace.of(call.args[0])
    place = 2 if call.name == "topk" else 1
    dim = call.kwargs.get("dim", call.arg(place, -1))
    if isinstance(dim, bool):  # sort(x, stable, dim)
        dim = call.arg(2, -1)
    trace.reduce(labels, [dim % max(1, labels.dim())], call.name)
    if labels.dim() and varies(labels, dim % labels.dim()):
        return [None] * len(call.outputs)
    narrow = labels.narrow(dim, 0, 1) if labels.dim() else labels
    return [narrow.expand(t.shape) for t in call.outputs]


# --- pointwise operations


@rule(
    "where",
    "copy",
    "masked_fill",
    "gelu",
    "silu",
    "mish",
    "hardswish",
    "hardsigmoid",
    "elu",
    "fill",
)
@rule(
    "leaky_relu", "hardtanh", "softplus", "log_sigmoid_forward", "clamp", "rrelu_with_noise", "zero"
)
@rule(
    "_prelu_kernel", "prelu", "celu", "selu", "relu6", "threshold", "__and__", "__or__", "__xor__"
)
@rule(
    "bitwise_and",
    "bitwise_or",
    "log_sigmoid",
    "nan_to_num",
    "rsub",
    "floor_divide",
    "isnan",
    "isinf",
)
@rule(
    "fake_quantize_per_tensor_affine", "lerp", "addcmul", "addcdiv", "polar", "complex", "isclose"
)
def pointwise(trace: Trace, call: Call) -> Labels:
    """Ties operands element by element; pins one that is broadcast over channels."""
    shape = call.outputs[0].shape
    tensors = call.tensors
    if call.name == "copy" and trace.is_weight(tensors[0]):
        return None
    if call.name in ("fill", "zero"):
        return trace.of(tensors[0])
    if call.name == "copy":
        tensors = tensors[1:2]
    operands = [trace.of(t) for t in tensors]
    operands = [o.view([1] * (len(shape) - o.dim()) + list(o.shape)) for o in operands]
    # of two that are broadcast over each other's channels, parameters are pinned first
    order = sorted(range(len(operands)), key=lambda i: trace.name(tensors[i]) is None)
    left = dict(enumerate(operands))
    for place in order:
        dims = {d for other in left.values() for d in varied(other)}
        if any(operands[place].shape[d] == 1 and shape[d] > 1 for d in dims):
            trace.pin(left.pop(place), f"broadcast over channels ({call.name})")
    full = [labels.expand(shape) for labels in left.values()]
    if not full:
        return None
    trace.tie(*full)
    return next((labels for labels in full if labelled(labels)), None)


# --- products


@rule("mm", "bmm", "addmm", "baddbmm", "matmul", "linear")
def product(trace: Trace, call: Call) -> Labels:
    """(…, M, K) times (…, K, N). A weight ties what it reads along K and makes labels along N; of
    two activations the sum over K pins, and labels along M or N go on."""
    operands = list(call.args)
    bias = None
    if call.name in ("addmm", "baddbmm"):
        bias, *operands = operands
    a, b = operands[:2]
    out = call.outputs[0]
    if trace.is_weight(b) and b.dim() == 2:
        labels = _weighted(trace, a, b, out)
    elif trace.is_weight(a) and a.dim() == 2:
        labels = _weighted_columns(trace, a, b, out)
    else:
        labels = _of_activations(trace, trace.of(a), trace.of(b), out, call.name)
    if isinstance(bias, torch.Tensor):
        own = trace.of(bias)
        labels = torch.zeros(out.shape) if labels is None else labels
        trace.tie(labels, own.expand(out.shape))
    return labels


def _weighted(trace: Trace, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> Labels:
    labels = trace.of(x)
    if varied(labels) and not varies(labels, labels.dim() - 1):  # channels are rows: each by itself
        _pinned(trace, [weight], "a matrix product over another dimension")
        return labels.narrow(-1, 0, 1).expand(out.shape)
    trace.tie(trace.axis(weight, 0, reads=True), trace.along(labels, labels.dim() - 1))
    return trace.axis(weight, 1).expand(out.shape)


def _weighted_columns(
    trace: Trace, weight: torch.Tensor, x: torch.Tensor, out: torch.Tensor
) -> Labels:
    labels = trace.of(x)
    if varied(labels) and not varies(labels, labels.dim() - 2):
        _pinned(trace, [weight], "a matrix product over another dimension")
        return labels.narrow(-2, 0, 1).expand(out.shape)
    trace.tie(trace.axis(weight, 1, reads=True), trace.along(labels, labels.dim() - 2))
    return trace.axis(weight, 0)[:, None].expand(out.shape)


def _of_activations(
    trace: Trace, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, why: str
) -> Labels:
    summed = varies(a, a.dim() - 1), varies(b, b.dim() - 2)
    free = [
        labels for labels, over in zip((a, b), summed, strict=True) if labelled(labels) and not over
    ]
    if len(free) == 2:
        batch = range(a.dim() - 2)
        if all(d in batch for labels in free for d in varied(labels)):  # each matrix by itself
            trace.tie(a[..., :1, :1], b[..., :1, :1])
        else:
            free = []
    for labels in (a, b):
        if all(labels is not other for other in free):
            trace.pin(labels, f"a product of activations ({why})")
    if not free:
        return None
    own, other = (a, b) if free[0] is a else (b, a)
    if len(free) == 1:
        _same_in_batch(trace, own, other)
    return own.narrow(-1 if own is a else -2, 0, 1).expand(out.shape)


def _same_in_batch(trace: Trace, labels: torch.Tensor, other: torch.Tensor) -> None:
    """The matrices of a batch have equal shapes, and as many stay as there are of the other
    operand: heads of attention lose equal positions."""
    for dim in range(labels.dim() - 2):
        if varies(labels, dim) and other.shape[dim] > 1:
            trace.tie(labels, labels.narrow(dim, 0, 1))


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_attention_math")
@rule("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable")
def attention(trace: Trace, call: Call) -> list[Labels]:
    """softmax(q kᵀ) v: the channels of v go on, those of q and k are pinned."""
    q, k, v = call.args[:3]
    _pinned(trace, [q, k], "attention")
    labels = trace.of(v)
    trace.reduce(labels, [labels.dim() - 2], "attention")
    _same_in_batch(trace, labels, trace.of(q))
    out = call.outputs[0]
    own = labels.narrow(-2, 0, 1).expand(out.shape)
    return [own, *[None] * (len(call.outputs) - 1)]


@rule("embedding")
def embedding(trace: Trace, call: Call) -> Labels:
    """Rows of a table: its columns are channels."""
    if not trace.is_weight(call.args[0]):
        return unknown(trace, call)
    return trace.axis(call.args[0], 1).expand(call.outputs[0].shape)


# --- layers with weights


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "conv_tbc")
def convolution(trace: Trace, call: Call) -> Labels:
    """Convolutions and transposed ones, in groups, depthwise, in any number of dimensions."""
    x, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    return convolved(trace, x, weight, bias, transposed, groups, call.outputs[0])


@rule("torchvision::deform_conv2d")
def deform_conv2d(trace: Trace, call: Call) -> Labels:
    x, weight, offset, mask, bias = call.args[:5]
    _pinned(trace, [offset, mask], "deform_conv2d")
    return convolved(trace, x, weight, bias, False, call.args[11], call.outputs[0])


def convolved(
    trace: Trace,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    groups: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """The labels of the output of a convolution of ``x`` (N, C, ...)."""
    labels = trace.of(x)
    if varied(labels) and not varies(labels, 1):  # its channels are positions
        trace.pin(labels, "a convolution along another dimension")
    reads = trace.along(labels, 1)
    writes = _filters(trace, reads, weight, transposed, groups, out.shape[1])
    if bias is not None:
        trace.tie(writes, trace.of(bias))
    return writes.view(-1, *[1] * (out.dim() - 2)).expand(out.shape)


def _filters(
    trace: Trace,
    reads: torch.Tensor,
    weight: torch.Tensor,
    transposed: bool,
    groups: int,
    width: int,
) -> torch.Tensor:
    """The labels of what a convolution writes, tied to its weight's."""
    if not trace.is_weight(weight):  # computed: standardised, masked, or from the input
        trace.pin(reads, "a weight that is computed")
        if transposed or groups > 1:
            trace.pin(trace.of(weight), "a weight that is computed")
            return torch.zeros(width)
        return trace.along(trace.of(weight), 0)
    if groups > 1 and weight.shape[1] == 1 and (not transposed or groups == width):  # depthwise
        writes = trace.axis(weight, 0)
        trace.tie(writes, reads.repeat_interleave(width // groups))
        trace.size(groups, reads)
        return writes
    if transposed:
        trace.tie(trace.axis(weight, 0, reads=True), reads)
        _equal_parts(trace, reads, groups)
        return trace.axis(weight, 1).repeat(groups)
    columns = trace.axis(weight, 1, reads=True)
    trace.tie(reads.view(groups, -1), columns.expand(groups, -1))
    writes = trace.axis(weight, 0)
    _equal_parts(trace, writes, groups)
    return writes


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
@rule("cudnn_batch_norm", "_batch_norm_with_update", "miopen_batch_norm", "_batch_norm_no_update")
@rule("batch_norm")
def batch_norm(trace: Trace, call: Call) -> list[Labels]:
    """Each channel by itself, with a scale, a shift and statistics of its own."""
    x, *parts = call.args[:5]
    labels = trace.of(x)
    rows = trace.along(labels, 1)
    for part in parts:
        if part is not None:
            trace.tie(rows, trace.of(part))
    trace.size(x.shape[1], rows)
    own = [t.shape == x.shape for t in call.outputs]
    return [rows.view(-1, *[1] * (x.dim() - 2)).expand(x.shape) if same else None for same in own]


@rule("native_group_norm")
def group_norm(trace: Trace, call: Call) -> list[Labels]:
    """Normalises each group of channels: whole groups go."""
    x, weight, bias = call.args[:3]
    groups = call.args[6]
    rows = trace.along(trace.of(x), 1)
    for part in (weight, bias):
        if part is not None:
            trace.tie(rows, trace.of(part))
    if groups == 1:
        trace.pin(rows, "normalised over all channels (GroupNorm)")
    trace.size(x.shape[1], rows)
    of_group = rows.view(groups, -1)
    trace.tie(of_group, of_group[:, :1].expand_as(of_group))
    trace.size(x.shape[1], rows)
    return [rows.view(-1, *[1] * (x.dim() - 2)).expand(x.shape), None, None]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(trace: Trace, call: Call) -> list[Labels]:
    """Pins what varies over the dimensions that it normalises."""
    x, shape = call.args[:2]
    labels = trace.of(x)
    trace.reduce(
        labels, range(x.dim() - len(shape), x.dim()), "normalised over all channels (LayerNorm)"
    )
    own = any(varies(labels, d) for d in range(x.dim() - len(shape), x.dim()))
    for part in call.tensors[1:]:
        if own:
            trace.tie(labels, trace.of(part).expand(x.shape))
        else:
            trace.pin(trace.of(part), "broadcast over channels (LayerNorm)")
    return [labels, *[None] * (len(call.outputs) - 1)]


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(trace: Trace, call: Call) -> list[Labels]:
    """v / ‖v‖ · g: each filter by itself, with its own length g."""
    v, g = call.args[:2]
    if call.arg(2, 0) != 0:
        return [unknown(trace, call)] * len(call.outputs)
    labels = trace.of(v)
    trace.reduce(labels, range(1, v.dim()), call.name)
    labels = trace.along(labels, 0).view(g.shape)
    trace.tie(labels, trace.of(g))
    return [labels.expand(v.shape), *[None] * (len(call.outputs) - 1)]


# --- what has no channels


@rule("_local_scalar_dense", "is_nonzero", "equal", "item", "_assert_async", "isfinite")
def nothing(trace: Trace, call: Call) -> Labels:
    """Reads values; returns none."""
    return None


@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "empty_strided")
def new(trace: Trace, call: Call) -> Labels:
    """Constants of a size that the code computes; the shape may follow the network's."""
    return None


@rule("torchvision::nms")
def nms(trace: Trace, call: Call) -> Labels:
    trace.pin(trace.of(call.args[0]), "nms")
    trace.pin(trace.of(call.args[1]), "nms")
    return None


EVERY = Rules(view, rule_of, unknown)
