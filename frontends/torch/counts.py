"""Multiply-accumulates of a torch call that stays opaque: it is run on shapes alone, and its operations are counted.

Torch's own formulas (`torch.utils.flop_counter`) count products; entrywise operations, views and the names below are
known to have none. Any other operation makes the count unknown, with its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cipm_ir.ops.costs import fourier_macs

_FREE = """
_adaptive_avg_pool2d _adaptive_avg_pool3d _assert_async _embedding_bag _embedding_bag_forward_only
_local_scalar_dense _log_softmax _native_batch_norm_legit _native_batch_norm_legit_no_training _softmax
_thnn_fused_gru_cell _thnn_fused_lstm_cell _to_copy _unique2 _weight_norm_interface adaptive_max_pool2d
adaptive_max_pool3d alias all amax amin aminmax any arange argmax argmin argsort as_strided avg_pool2d avg_pool3d
bernoulli bincount bucketize cat clone col2im constant_pad_nd copy copy_ count_nonzero cumprod cumsum detach detach_
embedding empty empty_like empty_strided expand eye fill fill_ flip full full_like gather histc im2col index
index_add index_copy index_fill index_put index_put_ index_select kthvalue lift lift_fresh lift_fresh_copy
linalg_vector_norm linspace logsumexp masked_fill masked_fill_ masked_scatter masked_select max
max_pool2d_with_indices max_pool3d_with_indices max_unpool2d max_unpool3d mean median min mode multinomial nansum
native_batch_norm native_dropout native_group_norm native_layer_norm new_empty new_empty_strided new_full new_ones
new_zeros nonzero norm normal one_hot ones ones_like permute pixel_shuffle pixel_unshuffle prod rand rand_like
randint randn randn_like randperm reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave
replication_pad1d replication_pad2d replication_pad3d resize_ roll scatter scatter_add scatter_reduce searchsorted
select_scatter set_ slice_scatter sort split_with_sizes stack std std_mean sum take topk tril triu unfold unsafe_split
unique_consecutive upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
upsample_nearest3d upsample_trilinear3d var var_mean zero_ zeros zeros_like
"""
_FOURIER = {"_fft_r2c": True, "_fft_c2r": True, "_fft_c2c": False}
"""Whether one side of the transform is real."""


def count_call(name: str, run: Callable[[], Any]) -> tuple[int | None, str]:
    """Return multiply-accumulates of an operation; None and the reason where unknown.

    Args:
        name: of the operation, without its overload.
        run: calls it on tensors without numbers.
    """
    if name in _FREE.split():  # some cannot be run that way: sizes of the result depend on values
        return 0, ""
    counting = _Counting()
    try:
        with torch.no_grad(), counting:
            run()
    except Exception as error:  # any code of torch or of the user, on tensors that hold nothing
        return None, f"it cannot be run on shapes alone ({type(error).__name__})"
    if counting.unknown:
        return None, f"no formula counts {', '.join(sorted(counting.unknown))}"
    return counting.total, ""


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet in flop_registry:
            out = func(*args, **kwargs)
            self.total += int(flop_registry[packet](*args, **kwargs, out_val=out)) // 2
            return out
        with self:
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        out = func(*args, **kwargs)
        own = _own_formula(packet.__name__, args, out)
        if own is not None:
            self.total += own
        elif not _is_free(func, packet.__name__):
            self.unknown.add(str(packet))
        return out


def _own_formula(name: str, args: Any, out: Any) -> int | None:
    """Return products that torch's flop counter leaves out."""
    if name in _FOURIER:
        signal = args[0] if args[0].numel() >= out.numel() else out
        dims = [args[1]] if isinstance(args[1], int) else list(args[1])
        sizes = [out.shape[d] if name == "_fft_c2r" else args[0].shape[d] for d in dims]
        return sum(fourier_macs(signal.numel() // n, n, real=_FOURIER[name]) for n in sizes if n)
    if name in ("mv", "dot", "vdot"):
        return int(args[0].numel())
    if name in ("addmv", "addr"):
        return int(args[1].numel() * (args[2].numel() if name == "addr" else 1))
    if name in ("grid_sampler_2d", "grid_sampler_3d"):
        taps = {0: 2, 1: 0, 2: 4}[args[2]]
        return int(math.prod(out.shape) * taps ** (out.dim() - 2))
    if name in ("_grouped_mm", "grouped_mm_fallback"):  # rows, each with the matrix of its expert
        return int(args[0].numel() * out.shape[-1])
    if name == "_cdist_forward":
        return int(out.numel() * args[0].shape[-1])
    return None


def _is_free(func: Any, name: str) -> bool:
    if torch.Tag.pointwise in func.tags or name in _FREE.split():
        return True
    return any(a.alias_info is not None for a in func._schema.returns)  # a view, or a write of what was computed
