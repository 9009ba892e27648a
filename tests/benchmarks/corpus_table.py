"""A table of the corpus: one row a model, from units and exact passes to what a slimmer makes of it.

    python -m tests.benchmarks.corpus_table [NAME ...] [--columns units,exact,prune,peers] [--peers FOLDER]
        [--results corpus.jsonl] [--out table.md] [--passes NAME,...] [--repeats 1] [--timeout 60] [--jobs 2]

`make corpus` fetches the models. Each measurement is limited in time and memory, printed when it is done, and written
to `--results`; what is there already is not measured again, so a run may be resumed. One that takes longer than
`--timeout` is a row that says so. `--jobs` models are measured at once, whole commands (peers) one by one at the end.

* units: units and opaque nodes with the sizes that the file leaves open, and with the sizes of the realistic input.
* exact: every exact pass alone, see `tests.benchmarks.exact_table`: its largest difference on probes and on a realistic
  input, seconds of the pass and of the verification, and the memory that it adds to the model that was read.
* prune: to 80% and 50% of the multiply-accumulates: valid, runs, how far outputs move, relative to their largest entry.
* peers: nodes without Constants, wall seconds (the least of `--repeats`) and peak memory of the whole command:
  `cipm optimize`, the same without verification, onnxslim and onnxsim from the folder `--peers` (the bin of a virtual
  environment that holds both; without it those columns stay empty).
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from tests.benchmarks.exact_table import apart, exact_passes
from tests.benchmarks.forked import Row, forked, lines_of
from tests.corpus import corpus, path_of
from tests.corpus.inputs import Feeds, samples
from tests.oracles.double_precision import Single

import cipm_ir
from cipm_ir.errors import InputError
from cipm_ir.runtime.inputs.generate import batches

COLUMNS = "units", "exact", "prune", "peers"
BUDGETS = 0.8, 0.5
# Starts a command and says how it went. A process that is started from a large one counts that one's memory as its own,
# so this small one lies in between.
_LAUNCHER = """
import json, os, sys, threading, time
start = time.perf_counter()
# Users' interpreters keep their bytecode.
environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
child = os.posix_spawn(sys.argv[2], sys.argv[2:], environment, file_actions=[
    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0), (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)])
timer = threading.Timer(float(sys.argv[1]), os.kill, (child, 9))
timer.daemon = True
timer.start()
_, status, usage = os.wait4(child, 0)
print(json.dumps({"wall": time.perf_counter() - start, "cpu": usage.ru_utime + usage.ru_stime,
                  "peak": usage.ru_maxrss / 1024, "status": os.waitstatus_to_exitcode(status)}))
"""


# --- in a process of its own ----------------------------------------------------------------------


def fixed(path: Path, feeds: Feeds) -> ir.Model:
    """Return the model with the sizes of its inputs taken from one input."""
    proto = onnx.load(path)
    for value in proto.graph.input:
        if value.name in feeds:
            shape = value.type.tensor_type.shape
            del shape.dim[:]
            for size in feeds[value.name].shape:
                shape.dim.add().dim_value = size
    # What the file notes about inner values holds for other sizes.
    del proto.graph.value_info[:]
    return ir.from_proto(proto)


def units(name: str) -> Row:
    """Count units and opaque nodes at open and at fixed sizes."""
    made: Row = {}
    for kind, model in (("open", ir.load(path_of(name))), ("fixed", fixed(path_of(name), samples(name, 1)[0]))):
        start = time.process_time()
        program = cipm_ir.load(model)
        made[kind] = {
            "units": sum(space.size for space in program.spaces),
            "spaces": len(program.spaces),
            "opaque": len(program.opaque),
            "cpu": time.process_time() - start,
        }
    return made


def prune(name: str, budget: float) -> Row:
    """Prune, check the result with onnx, run it on the realistic inputs."""
    path, feeds = path_of(name), samples(name)
    result = cipm_ir.optimize(str(path), [f"prune{{macs={budget}}}"], data=readable(path, feeds))
    if result.report.skipped:
        return {"refused": f"left out: {result.report.steps[0].summary[:160]}"}
    proto = ir.to_proto(result.program.emit())
    made: Row = {"macs": result.report.after.macs / max(result.report.before.macs, 1)}
    try:
        onnx.checker.check_model(proto, full_check=True)
        made["valid"] = True
    except Exception as error:
        made["valid"] = f"no: {str(error)[:120]}"
    before, after = Single(ir.load(path)), Single(ir.from_proto(proto))
    made["moved"] = max(change(before.run(one), after.run(one)) for one in feeds)
    return made


def change(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Return the largest difference of outputs relative to the largest entry of each; infinite where shapes differ."""
    worst = 0.0
    for key, value in first.items():
        if value.shape != second[key].shape:
            return float("inf")
        wide = value.astype(np.float64)
        scale = max(float(np.abs(wide).max(initial=0.0)), 1e-30)
        worst = max(worst, float(np.abs(wide - second[key]).max(initial=0.0)) / scale)
    return worst


def readable(path: Path, feeds: Sequence[Feeds]) -> Sequence[Feeds] | None:
    """Return realistic inputs as calibration data; None where the product cannot take them as samples."""
    try:
        return feeds if list(batches(feeds, ir.load(path))) else None
    except InputError:
        return None


_MEASURES: Mapping[str, Callable[[str], Row]] = {
    "units": units,
    **{f"prune {budget:g}": functools.partial(prune, budget=budget) for budget in BUDGETS},
}


# --- processes ------------------------------------------------------------------------------------


def in_a_process(name: str, wanted: Sequence[str], timeout: float, gigabytes: int) -> Iterator[tuple[str, Row]]:
    """Take measurements in forks of one process, limited in time and memory."""
    command = [sys.executable, "-m", "tests.benchmarks.corpus_table", name, "--one", ",".join(wanted)]
    command += ["--timeout", str(timeout)]
    missing = list(wanted)
    for row in lines_of(command, timeout * (len(wanted) + 1), gigabytes):
        if "what" in row:
            missing.remove(row["what"])
            yield row["what"], row["row"]
        else:
            yield from ((what, row) for what in missing)


def command(arguments: Sequence[str], timeout: float) -> Row:
    """Run a command: wall and CPU seconds, peak memory in MB, exit code (-9: killed after `timeout` seconds)."""
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(timeout), *arguments]
    done: Row = json.loads(subprocess.run(launcher, capture_output=True, text=True, check=True).stdout)
    return done


def count_nodes(path: Path) -> int:
    """Count the nodes of a file, those of subgraphs included, without Constants."""

    def of(graph: onnx.GraphProto) -> int:
        inner = [a for node in graph.node for a in node.attribute]
        below: int = sum(of(a.g) for a in inner if a.type == onnx.AttributeProto.GRAPH)
        return below + len([node for node in graph.node if node.op_type != "Constant"])

    model: onnx.ModelProto = onnx.load(path, load_external_data=False)
    return of(model.graph)


def peers(name: str, folder: Path | None, repeats: int, timeout: float) -> Row:
    """Run the whole command of ours and of others: nodes, seconds and memory of each."""
    source = path_of(name)
    made: Row = {"nodes": count_nodes(source)}
    with tempfile.TemporaryDirectory() as scratch:
        ours = [sys.executable, "-m", "cipm_ir", "optimize", str(source), "-q", "-o"]
        todo = {"ours": [*ours, "OUT"], "unverified": [*ours, "OUT", "--no-verify"]}
        if folder is not None:
            todo |= {tool: [str(folder / tool), str(source), "OUT"] for tool in ("onnxslim", "onnxsim")}
        for tool, arguments in todo.items():
            target = Path(scratch) / f"{tool}.onnx"
            runs = [command([str(target) if a == "OUT" else a for a in arguments], timeout) for _ in range(repeats)]
            best = min(runs, key=lambda run: float(run["wall"]))
            made[tool] = best | {"nodes": count_nodes(target) if target.exists() else None}
    return made


def exact(name: str, passes: Sequence[str], timeout: float, gigabytes: int) -> Iterator[tuple[str, Row]]:
    """Measure every exact pass."""
    with tempfile.TemporaryDirectory() as scratch:
        feeds, data = samples(name, 1), None
        if readable(path_of(name), feeds):
            data = Path(scratch) / f"{name}.npz"
            np.savez(data, allow_pickle=False, **feeds[0])
        for row in apart(path_of(name), passes, data, timeout, gigabytes):
            yield f"exact {row['pass']}", row


# --- the table ------------------------------------------------------------------------------------


class Results:
    """Measurements in a file, one line each; the last of a kind counts."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows = {(row["model"], row["what"]): row["row"] for row in map(json.loads, lines)}

    def missing(self, name: str, what: str) -> bool:
        return (name, what) not in self.rows

    def add(self, name: str, what: str, row: Row) -> None:
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            self.rows[name, what] = row
            print(json.dumps({"model": name, "what": what, "row": row}), file=file)

    def of(self, name: str, what: str) -> Row:
        row: Row = self.rows.get((name, what), {})
        return row


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rows = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _trouble(row: Row) -> str:
    return f"CRASH {row['crash']}" if "crash" in row else str(row.get("refused", ""))


def markdown(results: Results, names: Sequence[str], columns: Sequence[str], passes: Sequence[str]) -> str:
    """Write the tables of the wanted columns."""
    parts: list[str] = []
    head: Sequence[str]
    if "units" in columns:
        lines: list[list[Any]] = []
        for name in names:
            row = results.of(name, "units")
            cells = (
                [row[kind][key] for kind in ("open", "fixed") for key in ("units", "opaque")]
                if "open" in row
                else [""] * 4
            )
            lines.append([name, corpus().models[name].kind, *cells, _trouble(row)])
        head = "model", "kind", "units, open sizes", "opaque", "units, fixed sizes", "opaque", ""
        parts.append(_table(head, lines))
    if "exact" in columns:
        lines = []
        for name in names:
            for one_pass in passes:
                row = results.of(name, f"exact {one_pass}")
                if not row:
                    continue
                cells = [_number(row.get(key), form) for key, form in _EXACT]
                lines.append(
                    [name, one_pass, row.get("changed", ""), *cells, row.get("verdict", ""), row.get("note", "")]
                )
        head = (
            "model",
            "pass",
            "changed",
            "max abs",
            "times rounding",
            "pass s",
            "verification s",
            "added MB",
            "verdict",
            "",
        )
        parts.append(_table(head, lines))
    if "prune" in columns:
        lines = []
        for name in names:
            cells = []
            for budget in BUDGETS:
                row = results.of(name, f"prune {budget:g}")
                cells += [_number(row.get("macs"), ".3f"), row.get("valid", ""), _number(row.get("moved"), ".2g")]
                cells.append(_trouble(row))
            lines.append([name, *cells])
        head = (
            "model",
            *(f"{word} {budget:.0%}" for budget in BUDGETS for word in ("MACs", "valid", "moved", "refused")),
        )
        parts.append(_table(head, lines))
    if "peers" in columns:
        lines = [_peer_line(name, results.of(name, "peers")) for name in names]
        head = ["model", "nodes", *(f"{tool} {word}" for word in ("nodes", "s", "MB") for tool in _TOOLS), ""]
        parts.append(_table(head, lines))
    return "\n\n".join(parts) + "\n"


_EXACT = ("own_abs", ".2g"), ("own_times", ".2g"), ("seconds", ".2f"), ("verification", ".2f"), ("memory", ".0f")
_TOOLS = "ours", "unverified", "onnxslim", "onnxsim"


def _peer_line(name: str, row: Row) -> list[Any]:
    runs = [row.get(tool, {}) for tool in _TOOLS]
    cells = [_number(run.get("nodes"), "d") for run in runs]
    cells += [_number(run.get("wall"), ".2f") for run in runs] + [_number(run.get("peak"), ".0f") for run in runs]
    failed = [f"{tool} exits with {run['status']}" for tool, run in zip(_TOOLS, runs, strict=True) if run.get("status")]
    best = min((run["nodes"] for run in runs[2:] if run.get("nodes") is not None), default=None)
    if best is not None and runs[0].get("nodes") is not None and runs[0]["nodes"] > best:
        failed.append(f"{runs[0]['nodes'] - best} nodes more than the better slimmer")
    return [name, row.get("nodes", ""), *cells, "; ".join(failed) or _trouble(row)]


def measure(results: Results, names: Sequence[str], given: argparse.Namespace, passes: Sequence[str]) -> None:
    """Measure what is missing and print it as it comes: several models at once, then whole commands one by one."""
    begin = time.monotonic()

    def note(name: str, what: str, row: Row) -> None:
        results.add(name, what, row)
        print(f"{time.monotonic() - begin:.0f} s, {name}, {what}: {_in_a_line(row)}", file=sys.stderr, flush=True)

    def inside(name: str) -> None:
        wanted = [what for what in _MEASURES if what.split()[0] in given.columns and results.missing(name, what)]
        if wanted:
            for what, row in in_a_process(name, wanted, given.timeout, given.memory):
                note(name, what, row)
        wanted = [one for one in passes if "exact" in given.columns and results.missing(name, f"exact {one}")]
        if wanted:
            for what, row in exact(name, wanted, given.timeout, given.memory):
                note(name, what, row)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(inside, names))
    for name in names:
        if "peers" in given.columns and results.missing(name, "peers"):
            note(name, "peers", peers(name, given.peers, given.repeats, given.timeout))


def _in_a_line(row: Row) -> str:
    shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items() if value != ""}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if key not in ("model", "pass"))[:240]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of models; all that were fetched by default")
    parser.add_argument("--columns", type=lambda text: text.split(","), default=list(COLUMNS), help=",".join(COLUMNS))
    parser.add_argument("--passes", type=lambda text: text.split(","), default=exact_passes(), help="of column exact")
    parser.add_argument("--peers", type=Path, help="folder with the commands onnxslim and onnxsim")
    parser.add_argument("--results", type=Path, default=Path("corpus.jsonl"), help="file of what was measured")
    parser.add_argument("--out", type=Path, help="file for the tables; without it they are printed")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each whole command")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one measurement")
    parser.add_argument("--jobs", type=int, default=2, help="models at once, but for column peers")
    parser.add_argument("--memory", type=int, default=12, help="gigabytes of address space for one measurement")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    unknown = [name for name in given.columns if name not in COLUMNS]
    if unknown:
        parser.error(f"no such column: {', '.join(unknown)}; there are {', '.join(COLUMNS)}")
    names = given.names or [name for name in corpus().models if path_of(name).exists()]
    missing = [name for name in names if name not in corpus().models or not path_of(name).exists()]
    if missing:
        parser.error(f"not there: {', '.join(missing)}; `make corpus` fetches models")
    if given.one:
        warnings.simplefilter("ignore")
        for what in given.one.split(","):
            row = forked(functools.partial(_MEASURES[what], names[0]), given.timeout)
            print(json.dumps({"what": what, "row": row}), flush=True)
        return
    results = Results(given.results)
    measure(results, names, given, given.passes)
    text = markdown(results, names, given.columns, given.passes)
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
