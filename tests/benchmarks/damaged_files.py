"""A thousand damaged or odd files, through the library and the command line: an error or a right answer.

``python -m tests.benchmarks.damaged_files --count 1000`` prints how they ended. Each case runs in a process of its own,
with limits of time and memory:

* *refused*: an error of `cipm_ir.errors`, one sentence, exit code 2, and no file is left;
* *right*: what is written computes what the file does in onnxruntime;
* *unrunnable*: something is written, and onnxruntime does not run the file;
* *wrong*, *raw* (another exception, exit code 3), *left over* (a file, or a part of one), *hang*, *killed*: defects.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tests.benchmarks.operator_graphs import operator_graph

Generator: TypeAlias = np.random.Generator
SECONDS, BYTES = 90, 6 << 30
DEFECTS = ("wrong", "raw", "left over", "hang", "killed")
PASSES = (
    (),
    ("clean-up", "canonicalize", "expose"),
    ("equalize", "fold-batch-norm", "canonicalize-signs"),
    ("prune{ratio=0.7}",),
)
_BIG, _HUGE = 1 << 30, (1 << 62) + 5


@dataclass(frozen=True)
class File:
    """A case: the bytes of an .onnx file, its data file if it has one, and what was done to it."""

    name: str
    kind: str
    content: bytes
    data: bytes | None = None


# --- damage ---------------------------------------------------------------------------------------

Damage: TypeAlias = Callable[[onnx.ModelProto, Generator], None]


def _some(rng: Generator, field: Any) -> Any:
    return field[int(rng.integers(len(field)))]


def _dims(rng: Generator, model: onnx.ModelProto) -> Any:
    infos = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    shapes = [info.type.tensor_type.shape for info in infos if info.type.tensor_type.shape.dim]
    return _some(rng, _some(rng, shapes).dim)


def _rename(model: onnx.ModelProto, rng: Generator) -> None:
    node = _some(rng, model.graph.node)
    field = node.input if len(node.input) and rng.random() < 0.5 else node.output
    field[int(rng.integers(len(field)))] = str(rng.choice(["ghost", "", "x", field[0]]))


def _dtype(model: onnx.ModelProto, rng: Generator) -> None:
    _some(rng, model.graph.initializer).data_type = int(rng.choice([0, 2, 6, 7, 10, 11, 16, 17, 22, 77]))


def _other_dtype(model: onnx.ModelProto, rng: Generator) -> None:
    tensor = _some(rng, model.graph.initializer)
    kind = rng.choice(np.array(["f2", "f8", "i8", "u1", "?"]))
    array = np.nan_to_num(numpy_helper.to_array(tensor).astype(np.float64))
    tensor.CopyFrom(numpy_helper.from_array(array.astype(kind), tensor.name))


def _input_dtype(model: onnx.ModelProto, rng: Generator) -> None:
    info = _some(rng, [*model.graph.input, *model.graph.output])
    info.type.tensor_type.elem_type = int(rng.choice([0, 2, 7, 8, 9, 10, 11, 14, 16, 99]))


def _tensor_shape(model: onnx.ModelProto, rng: Generator) -> None:
    tensor = _some(rng, model.graph.initializer)
    dims = list(tensor.dims)
    choices: list[list[int]] = [dims[::-1], [*dims, 1], dims[1:], [1, *dims], [int(np.prod(dims, dtype=np.int64))]]
    choices += [[-1, *dims[1:]], [_BIG, *dims[1:]], [_HUGE], [0, *dims[1:]], [k + 1 for k in dims]]
    del tensor.dims[:]
    tensor.dims.extend(choices[int(rng.integers(len(choices)))])


def _other_shape(model: onnx.ModelProto, rng: Generator) -> None:
    """Another shape with the entries for it, so that only the graph contradicts it."""
    tensor = _some(rng, model.graph.initializer)
    shape = [max(0, int(d) + int(rng.integers(-1, 2))) for d in tensor.dims] + [2] * int(rng.random() < 0.2)
    dtype = numpy_helper.to_array(tensor).dtype
    if dtype.kind in "fiub":
        tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, dtype), tensor.name))


def _cycle(model: onnx.ModelProto, rng: Generator) -> None:
    first, last = sorted(rng.integers(len(model.graph.node), size=2))
    node = model.graph.node[int(first)]
    if len(node.input):
        node.input[int(rng.integers(len(node.input)))] = model.graph.node[int(last)].output[0]


def _shuffle(model: onnx.ModelProto, rng: Generator) -> None:
    nodes = [model.graph.node[int(k)] for k in rng.permutation(len(model.graph.node))]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _attribute(model: onnx.ModelProto, rng: Generator) -> None:
    with_any = [node for node in model.graph.node if node.attribute] or list(model.graph.node)
    node = _some(rng, with_any)
    values: list[Any] = [-7, 0, _BIG, 1e30, float("nan"), [0, 0], [-1, _BIG], [1.5], "nonsense", b"\xff\xfe", [3] * 9]
    value = values[int(rng.integers(len(values)))]
    name = _some(rng, node.attribute).name if node.attribute and rng.random() < 0.8 else "axis"
    kept = [a for a in node.attribute if a.name != name]
    made = helper.make_attribute(name, value)
    del node.attribute[:]
    node.attribute.extend([*kept, made])


def _no_attribute(model: onnx.ModelProto, rng: Generator) -> None:
    with_any = [node for node in model.graph.node if node.attribute]
    if with_any:
        del _some(rng, with_any).attribute[:]


def _attribute_kind(model: onnx.ModelProto, rng: Generator) -> None:
    with_any = [node for node in model.graph.node if node.attribute]
    if with_any:
        _some(rng, _some(rng, with_any).attribute).type = int(rng.integers(0, 15))


def _field(model: onnx.ModelProto, rng: Generator) -> None:
    """Clear a field of something, whatever it is."""
    graph = model.graph
    places = [model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info]
    places += [attribute for node in graph.node for attribute in node.attribute]
    place = _some(rng, places)
    fields = [field for field, _ in place.ListFields()]
    if fields:
        place.ClearField(_some(rng, fields).name)


def _remove_inputs(model: onnx.ModelProto, rng: Generator) -> None:
    node = _some(rng, model.graph.node)
    if len(node.input):
        del node.input[int(rng.integers(len(node.input))) :]


def _more_inputs(model: onnx.ModelProto, rng: Generator) -> None:
    node, other = _some(rng, model.graph.node), _some(rng, model.graph.node)
    node.input.extend([*other.input, ""][: int(rng.integers(1, 3))])


def _other_operator(model: onnx.ModelProto, rng: Generator) -> None:
    names = [
        "Conv",
        "MatMul",
        "Gemm",
        "Softmax",
        "Reshape",
        "If",
        "Loop",
        "LSTM",
        "Split",
        "Gather",
        "Constant",
        "Nope",
    ]
    _some(rng, model.graph.node).op_type = str(rng.choice([*names, *(node.op_type for node in model.graph.node)]))


def _opset(model: onnx.ModelProto, rng: Generator) -> None:
    version = int(rng.choice([-3, 0, 1, 5, 6, 7, 8, 9, 11, 12, 13, 16, 18, 21, 25, 28, 29, 1000]))
    _some(rng, model.opset_import).version = version


def _domain(model: onnx.ModelProto, rng: Generator) -> None:
    _some(rng, model.graph.node).domain = str(rng.choice(["com.nobody", "com.microsoft", "ai.onnx", "ai.onnx.ml", "ß"]))


def _value_info(model: onnx.ModelProto, rng: Generator) -> None:
    """A wrong note on the shape of an inner value."""
    node = _some(rng, model.graph.node)
    shape = [int(k) for k in rng.integers(-1, 7, size=int(rng.integers(0, 5)))]
    kind = TensorProto.FLOAT if rng.random() < 0.8 else TensorProto.INT64
    model.graph.value_info.append(helper.make_tensor_value_info(_some(rng, node.output), kind, shape))


def _dimension(model: onnx.ModelProto, rng: Generator) -> None:
    dim = _dims(rng, model)
    if rng.random() < 0.3:
        dim.dim_param = str(rng.choice(["", "N", "a+b", "-", "ü", "N*0"]))
    else:
        dim.dim_value = int(rng.choice([-1, 0, 1, 2, 3, 1000, _BIG, -_HUGE]))


def _rank(model: onnx.ModelProto, rng: Generator) -> None:
    info = _some(rng, [*model.graph.input, *model.graph.output])
    info.type.tensor_type.shape.dim.add(dim_value=int(rng.integers(0, 4)))


def _drop_initializer(model: onnx.ModelProto, rng: Generator) -> None:
    del model.graph.initializer[int(rng.integers(len(model.graph.initializer)))]


def _drop_node(model: onnx.ModelProto, rng: Generator) -> None:
    del model.graph.node[int(rng.integers(len(model.graph.node)))]


def _twice(model: onnx.ModelProto, rng: Generator) -> None:
    graph = model.graph
    field = _some(rng, [f for f in (graph.node, graph.initializer, graph.input, graph.output) if len(f)])
    field.append(_some(rng, field))


def _as_constant(model: onnx.ModelProto, rng: Generator) -> None:
    """All weights in Constant nodes, somewhere among the nodes."""
    for tensor in list(model.graph.initializer):
        node = helper.make_node("Constant", [], [tensor.name], value=tensor)
        model.graph.node.insert(int(rng.integers(len(model.graph.node) + 1)), node)
    del model.graph.initializer[:]


def _special_values(model: onnx.ModelProto, rng: Generator) -> None:
    tensor = _some(rng, model.graph.initializer)
    array = np.array(numpy_helper.to_array(tensor))
    if array.size and array.dtype.kind == "f":
        array.reshape(-1)[int(rng.integers(array.size))] = rng.choice([np.nan, np.inf, -np.inf, 1e38, 1e-45])
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _versions(model: onnx.ModelProto, rng: Generator) -> None:
    model.ir_version = int(rng.choice([-1, 0, 1, 3, 4, 8, 13, 14, 15, 10**6]))


def _output(model: onnx.ModelProto, rng: Generator) -> None:
    names = ["ghost", *(info.name for info in model.graph.input)]
    names += [name for node in model.graph.node for name in node.output]
    names += [tensor.name for tensor in model.graph.initializer]
    model.graph.output.append(onnx.ValueInfoProto(name=str(rng.choice(names))))


def _nested(model: onnx.ModelProto, rng: Generator) -> None:
    """A node becomes an If whose branches hold it."""
    k = int(rng.integers(len(model.graph.node)))
    node = onnx.NodeProto.FromString(model.graph.node[k].SerializeToString())
    branches = []
    for name in ("then", "else"):
        inner = onnx.NodeProto.FromString(node.SerializeToString())
        inner.output[:] = [f"{name}.{out}" if out else "" for out in node.output]
        outputs = [onnx.ValueInfoProto(name=out) for out in inner.output if out]
        for info in outputs:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
        branches.append(helper.make_graph([inner], name, [], outputs))
    model.graph.initializer.append(numpy_helper.from_array(np.array(bool(rng.random() < 0.5)), "flag"))
    made = helper.make_node("If", ["flag"], list(node.output), then_branch=branches[0], else_branch=branches[1])
    model.graph.node[k].CopyFrom(made)


DAMAGES: dict[str, Damage] = {
    function.__name__.removeprefix("_").replace("_", " "): function
    for function in (
        _rename, _dtype, _other_dtype, _input_dtype, _tensor_shape, _other_shape, _cycle, _shuffle, _attribute,
        _no_attribute, _attribute_kind, _field, _remove_inputs, _more_inputs, _other_operator, _opset, _domain,
        _value_info, _dimension, _rank, _drop_initializer, _drop_node, _twice, _as_constant, _special_values, _versions,
        _output, _nested,
    )
}  # fmt: skip


def _bytes(content: bytes, rng: Generator) -> bytes:
    """Flipped, cut out or repeated bytes, or an end that is missing."""
    data = bytearray(content)
    choice = rng.integers(4)
    start, stop = sorted(int(k) for k in rng.integers(len(data), size=2))
    if choice == 0:
        del data[start:]
    elif choice == 1:
        for _ in range(int(rng.integers(1, 6))):
            # Half of them among the last bytes, where the graph's inputs, outputs and opsets are.
            low = 0 if rng.random() < 0.5 else max(0, len(data) - 400)
            data[int(rng.integers(low, len(data)))] ^= 1 << int(rng.integers(8))
    elif choice == 2:
        del data[start : start + int(rng.integers(1, 64))]
    else:
        data[stop:stop] = data[start : start + 32]
    return bytes(data)


def _external(model: onnx.ModelProto, rng: Generator, name: str) -> tuple[bytes, bytes | None]:
    """Weights beside the file, with a wrong place, a wrong length, or without the file."""
    data = bytearray()
    for tensor in model.graph.initializer:
        content = numpy_helper.to_array(tensor).tobytes()
        if numpy_helper.to_array(tensor).dtype == object:
            continue
        offset = len(data)
        data += content + bytes(int(rng.integers(0, 9)))
        tensor.ClearField("raw_data")
        for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(field)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", f"{name}.data"), ("offset", str(offset)), ("length", str(len(content)))):
            tensor.external_data.add(key=key, value=value)
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    if entries and rng.random() < 0.7:
        entry = _some(rng, entries)
        entry.value = str(rng.choice(["/etc/hostname", "../m.data", "", "-1", "99999999", "1e3", "none.data", "0"]))
    return model.SerializeToString(), None if rng.random() < 0.2 else bytes(data)


# --- cases ----------------------------------------------------------------------------------------


def sources() -> list[tuple[str, Callable[[], onnx.ModelProto]]]:
    """The small models of the zoo, and random graphs."""
    from tests import zoo
    from tests.fuzz_graphs import random_model

    names = zoo.names("synthetic", without=("large", "torch", "data", "reference"))
    made: list[tuple[str, Callable[[], onnx.ModelProto]]] = [(n, lambda n=n: zoo.build(n)) for n in names]  # type: ignore[misc]
    made += [(f"fuzz-{k}", lambda k=k: random_model(k, 8)) for k in range(20)]  # type: ignore[misc]
    return made


def case(number: int, seed: int = 0) -> File:
    """Case by number: one fifth damaged bytes, one fifth operator graphs, the rest damaged structures."""
    rng = np.random.default_rng((seed, number))
    if number % 5 == 1:
        opset = 7 + (number // 5) % (onnx.defs.onnx_opset_version() - 6)
        return File(f"{number} opset {opset}", "operators", operator_graph(rng, opset).SerializeToString())
    pool = sources()
    while True:
        name, build = pool[int(rng.integers(len(pool)))]
        model = onnx.ModelProto.FromString(build().SerializeToString())
        if model.ByteSize() < 300_000 and len(model.graph.initializer):
            break
    if number % 5 == 0:
        return File(f"{number} {name}", "bytes", _bytes(model.SerializeToString(), rng))
    if number % 25 == 2:
        return File(f"{number} {name}", "external", *_external(model, rng, "m.onnx"))
    kinds = list(DAMAGES)
    kind = kinds[number % len(kinds)]
    for k in range(1 + int(rng.random() < 0.25)):
        with contextlib.suppress(IndexError):  # a model without such a part
            DAMAGES[kind if k == 0 else kinds[int(rng.integers(len(kinds)))]](model, rng)
    return File(f"{number} {name}", kind, model.SerializeToString())


# --- judging --------------------------------------------------------------------------------------


def ran(path: Path) -> tuple[list[dict[str, Any]], list[list[Any]]] | str:
    """Inputs that onnxruntime takes and what comes out, or why not."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        infos = session.get_inputs()
    except Exception as error:
        return str(error).splitlines()[0][:200]
    found: list[dict[str, Any]] = []
    outputs: list[list[Any]] = []
    why = "no inputs fit"
    for size in (2, 1, 8, 16):
        rng = np.random.default_rng(size)
        feeds = {}
        for info in infos:
            shape = [d if isinstance(d, int) and d > 0 else size for d in info.shape]
            if np.prod(shape, dtype=float) > 1e7:
                return "an input is huge"
            kind = info.type.removeprefix("tensor(").rstrip(")")
            if kind in ("float", "double", "float16"):
                dtype = {"float": "f4", "double": "f8", "float16": "f2"}[kind]
                feeds[info.name] = rng.standard_normal(shape).astype(dtype)
            elif kind == "bool":
                feeds[info.name] = rng.random(shape) < 0.5
            elif kind.startswith(("int", "uint")):
                feeds[info.name] = rng.integers(0, 2, shape).astype(kind)
            else:
                return f"an input of type {info.type}"
        try:
            outputs.append(session.run(None, feeds))
            found.append(feeds)
        except Exception as error:
            why = str(error).splitlines()[0][:200]
    return (found, outputs) if found else why


def same(first: list[Any], second: list[Any]) -> bool:
    """Whether outputs agree, up to what rounding does to a sane network."""
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if isinstance(a, list) or isinstance(b, list):
            if not (isinstance(a, list) and isinstance(b, list) and same(a, b)):
                return False
            continue
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.dtype.kind not in "fc":
            if a.size and (a != b).mean() > 0.02:
                return False
            continue
        finite = np.isfinite(a) & np.isfinite(b)
        if (np.isnan(a) != np.isnan(b)).any() or (np.where(finite, 0, a) != np.where(finite, 0, b))[~np.isnan(a)].any():
            return False
        a, b = a[finite].astype(np.float64), b[finite].astype(np.float64)
        if a.size and np.abs(a - b).max() > (3e-2 if first[0].dtype == np.float16 else 2e-3) * np.abs(a).max() + 1e-6:
            return False
    return True


def judge(file: File, passes: tuple[str, ...]) -> tuple[str, str]:
    """How a case ends, and the words for it; to be called in a process and an empty folder of its own."""
    import cipm_ir
    from cipm_ir.cli import main

    source, target = Path("m.onnx"), Path("out.onnx")
    source.write_bytes(file.content)
    if file.data is not None:
        Path("m.onnx.data").write_bytes(file.data)
    Path("tmp").mkdir()
    tempfile.tempdir = str(Path("tmp").absolute())
    before = {path.name for path in Path().iterdir()}
    options = [word for one in passes for word in ("-p", one)]
    ends: list[tuple[str, str]] = []
    for way in ("library", "command"):
        said, code = "", 0
        if way == "library":
            try:
                cipm_ir.optimize(source, passes or None, output=target)
            except cipm_ir.CipmError as error:
                said, code = str(error), 2
            except MemoryError:
                return "killed", "MemoryError"
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(where.filename).name}:{where.lineno}"
                return "raw", f"{type(error).__name__} at {place}: {str(error)[:160]}"
        else:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(["optimize", str(source), "-o", str(target), "-q", *options])
            said = err.getvalue().strip().removeprefix("cipm: ")
            if code == 3 or "Traceback" in said:
                return "raw", f"command: {said[:200]}"
        over = {path.name for path in Path().iterdir()} - before - {target.name, f"{target.name}.data"}
        over |= {path.name for path in Path("tmp").iterdir()}
        if over:
            return "left over", f"{way}: {sorted(over)}"
        if code == 2:
            if target.exists():
                return "left over", f"{way}: {target} beside an error"
            if not said or len(said.strip().splitlines()) > 1 or len(said) > 800:
                return "raw", f"{way}: not one sentence: {said[:300]!r}"
            ends.append(("refused", said))
            continue
        ends.append(_compared(source, target, bool(passes) and passes[0].startswith("prune")))
        for path in (target, Path(f"{target}.data")):
            path.unlink(missing_ok=True)
    return next((end for end in ends if end[0] in DEFECTS), ends[0])


def _compared(source: Path, target: Path, approximate: bool) -> tuple[str, str]:
    if not target.exists():
        return "wrong", "nothing was written"
    first, second = ran(source), ran(target)
    if isinstance(first, str):
        return "unrunnable", first
    if isinstance(second, str):
        return "wrong", f"the result does not run: {second}"
    if approximate:
        return "right", "approximate"
    try:
        import onnxruntime as ort

        session = ort.InferenceSession(str(target), providers=["CPUExecutionProvider"])
        for feeds, outputs in zip(*first, strict=True):
            if not same(outputs, session.run(None, feeds)):
                return "wrong", "other outputs"
    except Exception as error:
        return "wrong", f"the result fails: {str(error)[:160]}"
    return "right", ""


def contained(file: File, passes: tuple[str, ...], seconds: int = SECONDS) -> tuple[str, str]:
    """Judge a case in a child process, with limits."""
    receiver, sender = os.pipe()
    folder = tempfile.mkdtemp(prefix="damaged-")
    pid = os.fork()
    if pid == 0:
        os.close(receiver)
        try:
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            try:
                end = judge(file, passes)
            except BaseException as error:
                end = "raw", f"judge: {type(error).__name__}: {str(error)[:200]}"
            os.write(sender, json.dumps(end).encode()[:60000])
        finally:
            os._exit(0)
    os.close(sender)
    ready, _, _ = select.select([receiver], [], [], seconds)
    content = os.read(receiver, 1 << 16) if ready else None
    if content is None:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(receiver)
    shutil.rmtree(folder, ignore_errors=True)
    if content is None:
        return "hang", f"more than {seconds} s"
    if not content:
        return "killed", "the process ended without a word"
    kind, words = json.loads(content)
    return kind, words


def run(numbers: range, seed: int) -> Iterator[tuple[File, tuple[str, str], float]]:
    """Judge cases one after the other."""
    for number in numbers:
        file = case(number, seed)
        start = time.perf_counter()
        yield file, contained(file, PASSES[(number // 5 + number) % len(PASSES)]), time.perf_counter() - start


def main() -> None:
    """Run a part of the cases; each line is one case, and the last lines count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="show the cases that ended well, too")
    options = parser.parse_args()
    import onnxruntime  # noqa: F401  (loaded once, before the children)
    import torch  # noqa: F401

    import cipm_ir.api
    import cipm_ir.cli  # noqa: F401

    tally: Counter[str] = Counter()
    kinds: Counter[tuple[str, str]] = Counter()
    slowest = 0.0
    for file, (end, words), seconds in run(range(options.first, options.first + options.count), options.seed):
        tally[end] += 1
        kinds[file.kind, end] += 1
        slowest = max(slowest, seconds)
        if options.all or end in DEFECTS:
            print(f"{end:10} {file.kind:16} {file.name}: {words}  [{seconds:.1f} s]", flush=True)
    print(
        f"\n{options.count} cases from {options.first}, seed {options.seed}: "
        + ", ".join(f"{count} {end}" for end, count in tally.most_common())
        + f"; slowest {slowest:.0f} s"
    )
    if not any(tally[end] for end in DEFECTS):
        return
    sys.exit(1)


if __name__ == "__main__":
    main()
