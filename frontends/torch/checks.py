"""Torch programs and example inputs that cannot be read, told before anything is traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from cipm_ir.errors import InputError, UnsupportedError


def check_readable(source: Any, example_inputs: Any, example_kwargs: Mapping[str, Any] | None) -> None:
    """Refuse scripted modules, modules that were never run, and inputs that are no dense tensors.

    Raises:
        UnsupportedError: a feature of the input is not supported.
        InputError: the model or the data cannot be used.
    """
    if isinstance(source, torch.jit.ScriptModule):
        raise UnsupportedError(
            f"{type(source).__name__} is a scripted module (torch.jit), whose Python is gone; "
            "give the nn.Module that it was made from."
        )
    for path, module in source.named_modules() if isinstance(source, nn.Module) else ():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"Module {path!r} is scripted (torch.jit), and its Python is gone; put in the original."
            )
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise InputError(f"Module {path!r} has parameters without a shape yet; run the model once.")
    for place, x in _tensors((example_inputs, example_kwargs or {})):
        if x.is_nested or x.layout != torch.strided:
            kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
            raise UnsupportedError(f"Example input {place} is a {kind} tensor; only dense ones can be read.")


def _tensors(examples: tuple[Any, Mapping[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors with the place where they stand."""
    args, kwargs = examples
    listed = args if isinstance(args, tuple | list) else (args,)
    yield from ((str(k), x) for k, value in enumerate(listed) for x in _leaves(value))
    yield from ((repr(name), x) for name, value in kwargs.items() for x in _leaves(value))


def _leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part)


_PACKS = ("pack_padded_sequence", "pack_sequence", "pad_packed_sequence", "unpad_sequence", "unpack_sequence")


def packing(error: BaseException | None) -> str:
    """Return the function of packed sequences in which reading failed; empty where it failed in none."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            code, held = trace.tb_frame.f_code, trace.tb_frame.f_locals
            if code.co_filename.endswith("torch/nn/utils/rnn.py") and code.co_name in _PACKS:
                return code.co_name
            if code.co_filename.endswith("torch/nn/modules/rnn.py") and held.get("batch_sizes") is not None:
                return f"pack_padded_sequence in front of {type(held.get('self')).__name__}"
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
    return ""


def way_out(module: nn.Module) -> str:
    """Return what to do about a module that cannot be made a graph."""
    for path, inner in module.named_modules():
        if getattr(getattr(inner, "config", None), "_experts_implementation", "") == "eager":
            return (
                f"The experts of {type(inner).__name__} run one after the other over the tokens that the router gave "
                f"them; call {path + '.' if path else ''}set_experts_implementation('grouped_mm') or 'batched_mm', "
                "which compute the same and can be read."
            )
    return "Rewrite what depends on the values of tensors (torch.cond, torch.where), or give a part of the model."
