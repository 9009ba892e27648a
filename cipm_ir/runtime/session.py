"""One way to run a model: onnxruntime on the CPU, and ONNX's reference evaluator where that has no kernel."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from cipm_ir.errors import InputError, UnsupportedError
from cipm_ir.ir.parameters import named
from cipm_ir.runtime.graphs import all_graphs
from cipm_ir.runtime.integer_products import processor_saturates, reencode_signed_weights

if TYPE_CHECKING:
    from onnx.reference import ReferenceEvaluator

Array: TypeAlias = npt.NDArray[Any]
Backend: TypeAlias = Literal["onnxruntime", "reference"]

_IN_MEMORY = 64 << 20
"""Up to this size a model is handed over as bytes, above as a file whose weights onnxruntime maps."""

_LENT = 1 << 20
"""Weights of so many bytes of a model that is handed over as bytes are lent to onnxruntime where they are."""
_LENDABLE = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT64}

_COPYING = "NchwcTransformer", "ConvBNFusion", "ConvMulFusion"
"""Optimizations that make new weights of convolutions in memory."""

_NO_KERNEL = (
    "could not find an implementation",
    "is not a registered function/op",
    "no op registered for",
    "unsupported model ir version",
    "is under development",
    "not implemented",
)
# Element types that cross the Python interface of onnxruntime as plain numpy arrays.
_PLAIN = {ir.DataType[name] for name in ("FLOAT", "DOUBLE", "FLOAT16", "BOOL", "STRING")}
_PLAIN |= {ir.DataType[f"{kind}{bits}"] for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)}


class Runner:
    """A model made ready to run; use it as a context manager, or call `close`.

    onnxruntime runs with its graph optimizations off: fusions and constant folding reorder arithmetic differently in
    two models that differ only by a change of gauge, which would blur what a comparison measures (a power-of-two scale
    must come back bit for bit). Products of 8-bit integers are exact then, also on processors whose kernels saturate.

    Args:
        model: not changed. Lazy and external weights are evaluated once, to a temporary file where they are large.
        extra_outputs: names of inner values of the main graph to give out as well.
        backend: None takes onnxruntime, and the reference evaluator where onnxruntime lacks a kernel.
        fast: with onnxruntime's graph optimizations, where speed counts and not every bit.
        threads: of onnxruntime; None leaves the number to it.
        own: the model was made for this runner, which may change it instead of a copy.
        lean: without the copies of weights that kernels rearrange, and with memory given back after each node: slower,
            and some sums round otherwise, so two models that are compared need the same. None: where weights lie in a
            file, unless ``fast``.

    Raises:
        UnsupportedError: the backend (or each of them) lacks an operator or a type that the model uses.
        InputError: the model is not valid.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        extra_outputs: Sequence[str] = (),
        backend: Backend | None = None,
        fast: bool = False,
        threads: int | None = None,
        own: bool = False,
        lean: bool | None = None,
    ) -> None:
        self._fast, self._parallel, self._lean, self._runs = fast, threads, lean, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lent: dict[str, ort.OrtValue] = {}
        """Weights that the session uses where they are."""
        self._model = _with_outputs(model if own else model.clone(), extra_outputs)
        self.outputs: tuple[str, ...] = tuple(value.name or "" for value in self._model.graph.outputs)
        self.inputs: frozenset[str] = frozenset(value.name or "" for value in self._model.graph.inputs)
        self._session: ort.InferenceSession | ReferenceEvaluator
        self.backend: Backend
        self._draws = _draws_from_a_seed(self._model)
        try:
            self._open(backend)
        except BaseException:
            self.close()
            raise

    def _open(self, backend: Backend | None) -> None:
        if backend == "reference":
            self.backend, self._session = "reference", self._reference()
            return
        try:
            if not self._fast and processor_saturates():
                reencode_signed_weights(self._model)
            self.backend, self._session = "onnxruntime", self._onnxruntime()
        except UnsupportedError as missing:
            if backend is not None:
                raise
            try:
                self.backend, self._session = "reference", self._reference()
            except UnsupportedError as also:
                raise UnsupportedError(f"{missing} {also}") from also

    def _onnxruntime(self) -> ort.InferenceSession:
        for value in (*self._model.graph.inputs, *self._model.graph.outputs):
            if value.dtype is not None and value.dtype not in _PLAIN:
                raise UnsupportedError(f"onnxruntime takes no {value.dtype.name} array ({value.name!r}).")
        options = ort.SessionOptions()
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if self._fast else level.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.use_deterministic_compute = True
        options.intra_op_num_threads = self._parallel or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leave the cores to others
        try:
            handed, spared = self._hand_over(options), list[str]()
            if self._lean or (self._lean is None and not self._fast and isinstance(handed, str)):
                options.add_session_config_entry("session.disable_prepacking", "1")
                options.enable_cpu_mem_arena = options.enable_mem_pattern = False
                spared = list(_COPYING)
            return ort.InferenceSession(handed, options, providers=["CPUExecutionProvider"], disabled_optimizers=spared)
        except ort_state.NotImplemented as error:
            raise UnsupportedError(f"onnxruntime cannot run the model: {_first_line(error)}") from error
        except Exception as error:
            refused = UnsupportedError if any(text in str(error).lower() for text in _NO_KERNEL) else InputError
            raise refused(f"onnxruntime cannot run the model: {_first_line(error)}") from error

    def _hand_over(self, options: ort.SessionOptions) -> bytes | str:
        """Return the model as onnxruntime takes it.

        Bytes, or the path of a file with external data in a temporary folder.
        """
        tensors = [tensor for graph in all_graphs(self._model) for tensor in _tensors(graph)]
        if sum(tensor.nbytes for tensor in tensors) <= _IN_MEMORY:
            with self._lent_weights(options):
                content: bytes = ir.to_proto(self._model).SerializeToString()
            return content
        self._folder = tempfile.TemporaryDirectory(prefix="cipm-ir-")
        path = Path(self._folder.name) / "model.onnx"
        try:
            ir.save(self._model, path, external_data="model.data", size_threshold_bytes=1023)
        except OSError as error:
            raise InputError(
                f"The model could not be written to the temporary folder {self._folder.name!r} to run it "
                f"({error.strerror}); point TMPDIR to a larger disk."
            ) from error
        return str(path)

    @contextlib.contextmanager
    def _lent_weights(self, options: ort.SessionOptions) -> Iterator[None]:
        """Hand large weights over in their own memory, and leave them out of the model meanwhile."""
        graph, kept = self._model.graph, dict[ir.Value, ir.TensorProtocol]()
        for value in graph.initializers.values():
            tensor = value.const_value
            # onnxruntime forgets initializers that no node of this graph takes, and then finds no place for them
            used = any(use.node.graph is graph for use in value.uses()) and not value.is_graph_input()
            if tensor is not None and tensor.nbytes >= _LENT and tensor.dtype in _LENDABLE and used:
                kept[value] = tensor
        for value, tensor in kept.items():
            array = np.asarray(tensor.numpy(), order="C")
            array = array if array.ctypes.data % 64 == 0 else array.copy()
            self._lent[value.name or ""] = ort.OrtValue.ortvalue_from_numpy(array)
        options.add_external_initializers(list(self._lent), list(self._lent.values()))
        try:
            _embeddable(self._model)
            for value, tensor in kept.items():
                shape, name = ir.Shape(tensor.shape.numpy()), value.name or ""
                value.const_value = ir.ExternalTensor("lent", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
            yield
        finally:
            for value, tensor in kept.items():
                value.const_value = tensor

    def _reference(self) -> ReferenceEvaluator:
        from onnx.reference import ReferenceEvaluator  # rarely needed, and slow to import

        try:
            return ReferenceEvaluator(ir.to_proto(_embeddable(self._model)))
        except Exception as error:
            raise UnsupportedError(f"The reference evaluator cannot run the model: {_first_line(error)}") from error

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once; gives the outputs by name, in the model's order or in that of `outputs`.

        Random numbers that are drawn from a seed are the same in every run: onnxruntime goes on in its stream from run
        to run, so that such a model is opened again.

        Raises:
            InputError: the run failed, as it does for feeds of the wrong shape.
        """
        names = list(self.outputs if outputs is None else outputs)
        if self._draws and self._runs:
            self._open(self.backend)
        self._runs += 1
        try:
            values = self._session.run(names, dict(feeds))
        except Exception as error:
            raise InputError(f"The model failed to run ({self.backend}): {_first_line(error)}") from error
        if not all(isinstance(value, (np.ndarray, np.generic)) for value in values):
            raise InputError("The model gives out sequences, maps or optionals; only tensors can be compared.")
        return dict(zip(names, map(np.asarray, values), strict=True))

    def close(self) -> None:
        """Free the session and remove temporary files."""
        if hasattr(self, "_session"):
            del self._session
        self._lent.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(model: ir.Model, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
    """Run a model once, see `Runner`; `outputs` may name inner values of the main graph."""
    known = {value.name for value in model.graph.outputs}
    extra = [name for name in outputs or () if name not in known]
    with Runner(model, extra_outputs=extra) as runner:
        return runner.run(feeds, outputs)


def _with_outputs(copy: ir.Model, extra: Sequence[str]) -> ir.Model:
    for graph in all_graphs(copy):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = named(value.const_value, value.name or "")
    values = {value.name: value for node in copy.graph for value in node.outputs}
    present = {value.name for value in copy.graph.outputs}
    for name in extra:
        if name not in values:
            raise InputError(f"The graph has no inner value {name!r} to give out.")
        if name not in present:
            copy.graph.outputs.append(_typed(values[name]))
            present.add(name)
    return copy


_WITH_SUM = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


def _typed(value: ir.Value) -> ir.Value:
    """Say the type of the sum that a skip normalization gives out; onnxruntime infers none for it."""
    maker = value.producer()
    if value.type is None and maker is not None and maker.op_type in _WITH_SUM:
        known = [v.dtype for v in maker.inputs if v is not None and v.dtype is not None and v.dtype.is_floating_point()]
        value.type = ir.TensorType(known[0] if known else ir.DataType.FLOAT)
    return value


def _tensors(graph: ir.Graph) -> list[ir.TensorProtocol]:
    return [value.const_value for value in graph.initializers.values() if value.const_value is not None]


def _embeddable(model: ir.Model) -> ir.Model:
    """Make a runner's own copy self-contained, in place: its external tensors are read when it is written."""
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _read_late(value.const_value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if not attribute.is_ref() and isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, _read_late(attribute.value))
    return model


def _read_late(tensor: ir.ExternalTensor) -> ir.LazyTensor:
    return ir.LazyTensor(lambda: tensor, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _draws_from_a_seed(model: ir.Model) -> bool:
    """Return whether a node, in functions too, has a seed of its own."""
    return any("seed" in node.attributes for graph in all_graphs(model) for node in graph)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    # onnxruntime's prefix says a code and the place in its own sources, which help no user.
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text.rstrip(".") + "."
