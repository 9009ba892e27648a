"""Do two models compute the same? Both run on the same inputs, given and random, and their outputs are compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cipm_ir.errors import CipmError, InputError, UnsupportedError
from cipm_ir.runtime.inputs import Data, Feeds, batches, random_inputs, true_inputs
from cipm_ir.runtime.session import Runner

Array: TypeAlias = npt.NDArray[Any]

TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "float16": 5e-3, "bfloat16": 4e-2}
"""The default of `rtol` by output type, relative to the largest value of the output.

Reordering the terms of float32 sums through a whole network changes outputs by 1e-7 to 2e-6 of their largest value
(rounding is 6e-8 per operation and partly averages out); ten times that still catches an error in a single small
weight. The other types scale with their rounding: 1e-16, 5e-4 and 4e-3 per operation.
"""

_TINY = {"float64": 1e-18, "float32": 1e-9, "float16": 1e-6, "bfloat16": 1e-6}
_RANDOM_OPS = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
# (batch, other unknown sizes, cap on integer inputs): the first that the model runs with is used. The later ones are
# for models with a batch baked in, for images that must survive much downsampling, and for tables that were not found.
_SIZES = ((2, 8, None), (1, 8, None), (2, 32, None), (1, 64, None), (1, 224, None), (1, 1, None), (1, 16, 2), (3, 3, 2))


@dataclass(frozen=True)
class Verification:
    """The outcome of a comparison; true in a condition when the models agree.

    Attributes:
        ok: the outputs agree; None when they could not be compared.
        max_abs: the largest |a - b| over all outputs and cases.
        max_rel: the largest of max|a - b| / max|a|, per output and case.
        cases: how many inputs were compared.
        reason: why not ok, or why not verified; empty otherwise.
        backend: what ran the models.
        outputs: (max_abs, max_rel) by output name.
    """

    ok: bool | None
    max_abs: float = 0.0
    max_rel: float = 0.0
    cases: int = 0
    reason: str = ""
    backend: str = ""
    outputs: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def verified(self) -> bool:
        """The models were compared, whatever came out."""
        return self.ok is not None

    def __bool__(self) -> bool:
        return self.ok is True

    def __str__(self) -> str:
        if self.ok is None:
            return f"not verified: {self.reason}"
        numbers = f"max |Δ| {self.max_abs:.3g}, relative {self.max_rel:.3g}, {self.cases} cases"
        return f"equal ({numbers})" if self.ok else f"different: {self.reason} ({numbers})"


def verify_models(
    a: ir.Model,
    b: ir.Model,
    *,
    data: Data | None = None,
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
    cases: int = 3,
) -> Verification:
    """Compare two models on at most `cases` batches of `data` and on `cases` random inputs.

    Floating outputs agree when max|a - b| <= rtol * max|a| + atol and NaN and infinities stand at the same places; all
    other outputs must be equal. The models run one after the other, so that one of them is in memory at a time.

    Args:
        a: the model taken as right.
        b: the model to compare; inputs and outputs must have the same names.
        data: samples, see `batches`.
        seed: of the random inputs.
        rtol: None takes `TOLERANCE` by output type.
        atol: None takes a value far below rounding, for outputs that are zero up to rounding.
        cases: how many of each.

    Raises:
        InputError: `data` does not fit the models.
    """
    difference = _interface_difference(a, b)
    if difference:
        return Verification(False, reason=difference)
    random_node = _random_node(a) or _random_node(b)
    if random_node:
        return Verification(None, reason=f"{random_node} draws random numbers, so two runs differ anyway")
    given = list(itertools.islice(batches(data, a), cases)) if data is not None else []
    try:
        feeds, expected, backend = _run_first(a, given, np.random.default_rng(seed), cases)
        try:
            actual = _run_second(b, feeds, backend)
        except UnsupportedError:
            # The second model is valid but uses a kernel that onnxruntime lacks: run both on the reference evaluator.
            feeds, expected, backend = _run_first(a, given, np.random.default_rng(seed), cases, "reference")
            actual = _run_second(b, feeds, backend)
    except CipmError as error:
        return Verification(None, reason=str(error).rstrip("."))
    if isinstance(actual, InputError):
        return Verification(False, cases=len(feeds), reason=f"the second model fails: {actual}", backend=backend)
    return compare_outputs(expected, actual, rtol, atol, backend)


def _run_first(
    model: ir.Model, given: list[Feeds], rng: np.random.Generator, cases: int, backend: Any = None
) -> tuple[list[Feeds], list[dict[str, Array]], Any]:
    with Runner(model, backend=backend) as runner:
        expected = [runner.run(feeds) for feeds in given]
        feeds = list(given)
        try:
            drawn = _accepted(model, runner, rng, cases)
        except CipmError:
            if not given:
                raise
            drawn = []
        for inputs, outputs in drawn:
            feeds.append(inputs)
            expected.append(outputs)
        return feeds, expected, runner.backend


def _accepted(
    model: ir.Model, runner: Runner, rng: np.random.Generator, cases: int
) -> list[tuple[Feeds, dict[str, Array]]]:
    """Random inputs of the first sizes that the model runs with, and its outputs."""
    first: InputError | None = None
    for batch, free_size, limit in _SIZES:
        try:
            drawn = []
            for _ in range(cases if true_inputs(model) else 1):
                inputs = random_inputs(model, rng, batch, free_size=free_size, index_limit=limit)
                drawn.append((inputs, runner.run(inputs)))
            return drawn
        except InputError as error:
            first = first or error
    raise first or InputError("No random inputs were tried.")


def _run_second(model: ir.Model, feeds: list[Feeds], backend: Any) -> list[dict[str, Array]] | InputError:
    try:
        with Runner(model, backend=backend) as runner:
            return [runner.run(inputs) for inputs in feeds]
    except InputError as error:
        return error


# --- comparison -----------------------------------------------------------------------------------


def compare_outputs(
    expected: list[dict[str, Array]],
    actual: list[dict[str, Array]],
    rtol: float | None,
    atol: float | None,
    backend: str,
) -> Verification:
    """Compare outputs by name, one dict for each case; see `verify_models` for the tolerances."""
    worst: dict[str, tuple[float, float]] = {}
    reason = ""
    if expected and not any(_informative(array) for want in expected for array in want.values()):
        return Verification(None, reason="no output has a finite entry on any input", backend=backend)
    for want, got in zip(expected, actual, strict=True):
        for name, array in want.items():
            max_abs, max_rel, why = compare(array, got[name], rtol, atol)
            before = worst.get(name, (0.0, 0.0))
            worst[name] = (max(before[0], max_abs), max(before[1], max_rel))
            if why and not reason:
                reason = f"output {name!r}: {why}"
    max_abs = max((pair[0] for pair in worst.values()), default=0.0)
    max_rel = max((pair[1] for pair in worst.values()), default=0.0)
    return Verification(not reason, max_abs, max_rel, len(expected), reason, backend, worst)


def compare(a: Array, b: Array, rtol: float | None = None, atol: float | None = None) -> tuple[float, float, str]:
    """(max|a - b|, that over max|a|, what is wrong or ""); infinite where shapes, types or infinities differ."""
    if a.shape != b.shape:
        return np.inf, np.inf, f"shape {list(a.shape)} became {list(b.shape)}"
    if a.dtype != b.dtype:
        return np.inf, np.inf, f"type {a.dtype} became {b.dtype}"
    if not _is_float(a):
        return _compare_exact(a, b)
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    x, y = a.astype(wide), b.astype(wide)
    finite = np.isfinite(x)
    if not np.array_equal(finite, np.isfinite(y)) or not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return np.inf, np.inf, "NaN or infinities at different places"
    error = float(np.max(np.abs(x[finite] - y[finite]), initial=0.0))
    scale = float(np.max(np.abs(x[finite]), initial=0.0))
    relative = error / scale if scale else (0.0 if error == 0 else np.inf)
    allowed = (TOLERANCE.get(a.dtype.name, 4e-2) if rtol is None else rtol) * scale
    allowed += _TINY.get(a.dtype.name, 1e-9) if atol is None else atol
    why = (
        "" if error <= allowed else f"max |Δ| is {error:.3g} where {allowed:.3g} is allowed (largest value {scale:.3g})"
    )
    return error, relative, why


def _informative(array: Array) -> bool:
    return not _is_float(array) or array.size == 0 or bool(np.isfinite(array.astype(np.complex128)).any())


def _is_float(array: Array) -> bool:
    # By name: numpy files ml_dtypes' bfloat16 and int4 under the same kind.
    return array.dtype.name.startswith(("float", "bfloat", "complex"))


def _compare_exact(a: Array, b: Array) -> tuple[float, float, str]:
    different = int(np.count_nonzero(a != b))
    if not different:
        return 0.0, 0.0, ""
    error = float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64)))) if a.dtype.kind in "iub" else np.inf
    scale = float(np.max(np.abs(a.astype(np.float64)))) if a.dtype.kind in "iub" else 0.0
    return error, error / scale if scale else np.inf, f"{different} of {a.size} entries differ"


def _interface_difference(a: ir.Model, b: ir.Model) -> str:
    for kind, first, second in (
        ("inputs", true_inputs(a), true_inputs(b)),
        ("outputs", list(a.graph.outputs), list(b.graph.outputs)),
    ):
        names = [value.name for value in first], [value.name for value in second]
        if sorted(map(str, names[0])) != sorted(map(str, names[1])):
            return f"the {kind} {names[0]} became {names[1]}"
    return ""


def _random_node(model: ir.Model) -> str:
    """The first node whose result is not a function of its inputs, described; "" if there is none.

    A node with a `seed` gives the same stream in both models and is allowed.
    """
    for node in _all_nodes(model):
        if node.domain not in ("", "ai.onnx") or "seed" in node.attributes:
            continue
        if node.op_type in _RANDOM_OPS or (node.op_type == "Dropout" and _trains(node)):
            return f"node {node.name!r} ({node.op_type})"
    return ""


def _trains(dropout: ir.Node) -> bool:
    mode = dropout.inputs[2] if len(dropout.inputs) > 2 else None
    if mode is None:
        return False
    constant = ir.convenience.get_const_tensor(mode)
    return constant is None or bool(constant.numpy().any())


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()
