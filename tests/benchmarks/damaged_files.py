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
from tests.benchmarks.file_damage import DAMAGES, damaged_bytes, damaged_external
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
_RANDOM = {f"Random{kind}{like}" for kind in ("Normal", "Uniform") for like in ("", "Like")}
_RANDOM |= {"Bernoulli", "Multinomial", "Dropout"}


@dataclass(frozen=True)
class File:
    """A case: the bytes of an .onnx file, its data file if it has one, and what was done to it."""

    name: str
    kind: str
    content: bytes
    data: bytes | None = None


# --- cases ----------------------------------------------------------------------------------------


def sources() -> list[tuple[str, Callable[[], onnx.ModelProto]]]:
    """The small models of the zoo, and random graphs."""
    from tests import zoo
    from tests.fuzz.fuzz_graphs import random_model

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
        return File(f"{number} {name}", "bytes", damaged_bytes(model.SerializeToString(), rng))
    if number % 25 == 2:
        return File(f"{number} {name}", "external", *damaged_external(model, rng, "m.onnx"))
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
    if any(node.op_type in _RANDOM for node in onnx.load(source, load_external_data=False).graph.node):
        return "right", "it draws random numbers"
    if len(first[1]) != len(second[1]) or not all(map(same, first[1], second[1])):
        return "wrong", "other outputs"
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
    for (kind, end), count in sorted(kinds.items()):
        print(f"  {kind:20} {end:10} {count}")
    if not any(tally[end] for end in DEFECTS):
        return
    sys.exit(1)


if __name__ == "__main__":
    main()
