"""Operator rules: one entry per ONNX operator."""

from __future__ import annotations

import importlib

FAMILIES = (
    "elementwise", "contraction", "convolution", "normalization", "reduction", "shaping", "indexing", "padding",
    "recurrent", "attention", "sampling", "quantized", "foreign", "runtime_fused", "runtime_attention",
    "runtime_quantized",
    "costs", "costs_free", "costs_runtime",
)  # fmt: skip


def load_rules() -> None:
    """Import every family, which registers its operators and what they cost."""
    for family in FAMILIES:
        importlib.import_module(f"cipm_ir.ops.{family}")
