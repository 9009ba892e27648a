"""What goes wrong around `compress`: data, budgets, scores, interruptions. Each says why, and leaves nothing behind."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tests.models.compress_nets import array_of, gap, images, mlp, program, residual, rows, two_convs, values
from tests.zoo.net import INT64, Net

import cipm_ir
from cipm_ir.errors import CipmError, InputError, OptionError, SymmetryError, VerificationError
from cipm_ir.passes.framework.base import Context, PassResult
from cipm_ir.passes.pruning.compress import compress as compress_module
from cipm_ir.passes.pruning.compress.compress import Compress
from cipm_ir.passes.pruning.limits import Limits
from cipm_ir.runtime import session
from cipm_ir.symmetry.program import Program

FAST: dict[str, Any] = {"steps": 3, "min_keep": 1, "rounds": 0}


def compress(made: Program, data: Any, **options: Any) -> PassResult:
    return Compress(**{**FAST, **options}).run(made, Context(data=data, original=made))


def contents(made: Program) -> dict[str, bytes]:
    return {n: array_of(made, n).tobytes() for n in made.model.graph.initializers}


# ---------------------------------------------------------------- data
def test_no_data() -> None:
    with pytest.raises(OptionError, match=r"give it calibration inputs \(data=, --data\)"):
        Compress(macs=0.5).run(program(mlp()), Context())


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"images": rows(8)["x"], "labels": rows(8)["x"]}, "no array for input 'x'; it holds 'images', 'labels'"),
        (rows(8, 7), r"Input 'x' has shape .*, but the data has shape \[8, 7\]"),
        ({"x": rows(8)["x"][0]}, r"but the data has shape \[6\]"),
        (rows(0), "holds no samples"),
        ([], "holds no samples"),
        ({}, "holds nothing"),
        ({"x": rows(8)["x"][0]}, "that is one sample without the batch axis; add it in front, as in x"),
        (3, "The data is of type int; give a dict of arrays by input name, an array"),
        ("missing.npz", "no data file 'missing.npz'"),
    ],
)
def test_data_that_does_not_fit(data: Any, complaint: str) -> None:
    made = program(mlp())
    before = contents(made)
    with pytest.raises(InputError, match=complaint):
        compress(made, data, macs=0.5)
    assert contents(made) == before


def test_too_few_samples_warn_with_the_rank() -> None:
    made = program(mlp(widths=(24, 20)))
    few = compress(made, rows(5), params=0.7)
    assert "warning: 5 samples give 5 rows for the 24 inputs of" in few.summary
    assert "(rank at most 5): refitting leans on damping; give more data" in few.summary
    assert all(np.isfinite(array_of(few.program, n)).all() for n in few.program.model.graph.initializers)
    assert "warning" not in compress(made, rows(400), params=0.7).summary


def test_one_sample_for_a_fixed_batch() -> None:
    made = program(mlp(batch=4))
    with pytest.raises(InputError, match="batches of exactly 4 samples, but the data holds 3"):
        compress(made, rows(3), params=0.7)
    assert compress(made, rows(5), params=0.7).changed


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_inputs(value: float) -> None:
    """Nothing varies, so nothing can be told about units: no number breaks, and the outputs on this input stay."""
    made = program(two_convs())
    data = {"x": np.full((20, 3, 6, 6), value, np.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compress(made, data, macs=0.6)
    assert all(np.isfinite(array_of(result.program, n)).all() for n in result.program.model.graph.initializers)
    dense, after = values(made, data)[0], values(result.program, data)[0]
    assert np.abs(dense - after).max() < 1e-2 * np.abs(dense).max()


def test_an_input_that_never_moves_among_others() -> None:
    """Dead units (their inputs are constant) go before live ones, and without numerical warnings."""
    net = Net("dead")
    first = net.relu(net.gemm(net.input("x", ["N", 6]), 6, 10))
    dead = net.relu(net.gemm(net.op("Mul", first, net.const(np.zeros(10))), 10, 8))
    net.output(net.gemm(net.op("Concat", first, dead, axis=1), 18, 3), ["N", 3])
    made = program(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compress(made, rows(300), params=0.65)
    assert float(result.metrics["divergence"]["measured"]) < 1e-6


@pytest.mark.parametrize("where", ["data", "inside"])
def test_nan_and_infinity(where: str) -> None:
    net = Net("log")
    x = net.input("x", ["N", 6])
    h = net.relu(net.gemm(x, 6, 10))
    h = net.op("Log", h) if where == "inside" else h
    net.output(net.gemm(h, 10, 3), ["N", 3])
    data = rows(20)
    if where == "data":
        data["x"][13, 2] = np.nan
    with pytest.raises(InputError, match=r"made by (Gemm|Relu|Log) .*, is NaN or infinite on samples 0 to 19"):
        compress(program(net), data, params=0.7)


def test_outputs_that_cannot_be_compared() -> None:
    net = Net("argmax")
    y = net.gemm(net.relu(net.gemm(net.input("x", ["N", 6]), 6, 10)), 10, 3)
    net.output(net.op("ArgMax", y, axis=1), ["N", 1], INT64)
    with pytest.raises(InputError, match="no floating-point value"):
        compress(program(net), rows(30), params=0.7)


# ---------------------------------------------------------------- budgets and scores
@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
def test_out_of_reach_says_what_can_be_reached(kind: str) -> None:
    made = program(mlp())
    with pytest.raises(SymmetryError, match=r"cannot come down to 0\.01 of the .*, 0\.\d+ remain.*lower min_keep"):
        compress(made, rows(60), **{kind: 0.01})
    with pytest.raises(SymmetryError, match=r"0\.6\d* remain"):
        compress(made, rows(60), params=0.2, min_keep=0.7)


def test_nothing_that_could_go() -> None:
    net = Net("soft")
    h = net.op("Softmax", net.gemm(net.input("x", ["N", 6]), 6, 10), axis=-1)
    net.output(net.gemm(h, 10, 3), ["N", 3])
    with pytest.raises(SymmetryError, match="finds no units that it may drop: @w_1: a normalization, softmax or sum"):
        compress(program(net), rows(30), macs=0.5, plain=False)
    with pytest.raises(OptionError, match=r"pattern 'nothing.' matches no space"):
        compress(program(mlp()), rows(30), macs=0.5, include=("nothing*",))


def test_a_drop_that_no_step_meets() -> None:
    net = Net("tanh")  # behind a Relu some unit might be dead, and go for nothing
    h = net.op("Tanh", net.gemm(net.input("x", ["N", 6]), 6, 8))
    net.output(net.gemm(h, 8, 3), ["N", 3])
    made = program(net)
    with pytest.raises(SymmetryError, match=r"no smaller model within max_drop 1e-12: already with .* divergence is"):
        compress(made, rows(60), max_drop=1e-12)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None, "good", np.ones(2)])
def test_a_score_that_is_no_number(score: Any) -> None:
    with pytest.raises(OptionError, match="evaluate must give a finite number, and gave"):
        compress(program(mlp()), rows(60), max_drop=0.1, evaluate=lambda run: score)


def test_a_score_that_fails_is_the_users_own_error() -> None:
    def broken(run: Any) -> float:
        raise KeyError("labels")

    with pytest.raises(KeyError, match="labels"):
        compress(program(mlp()), rows(60), max_drop=0.1, evaluate=broken)


# ---------------------------------------------------------------- nothing is lost
def test_interrupted_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ctrl-C in the middle of anything: no temporary file, no output, the source as it was."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(Limits, "cached", property(lambda _self: 1000))
    monkeypatch.setattr(session, "_IN_MEMORY", 100)
    made, data = program(residual(blocks=1)), images(64)
    source = ir.to_proto(made.emit())
    before = source.SerializeToString()
    steps: list[tuple[str, int]] = []

    def show(what: str, _fraction: float | None) -> None:
        steps.append((what, len(list((tmp_path / "tmp").rglob("*.npy")))))

    def run(progress: Any) -> None:
        cipm_ir.optimize(
            source, [Compress(macs=0.6, **FAST)], data=data, progress=progress, output=tmp_path / "out.onnx"
        )

    run(show)
    assert any(files for _, files in steps)  # the control: there were files in between
    assert not list((tmp_path / "tmp").iterdir()) and (tmp_path / "out.onnx").exists()
    (tmp_path / "out.onnx").unlink()
    kinds = list(dict.fromkeys(what for what, _ in steps))
    assert len(kinds) > 4
    for kind in kinds:

        def stop(what: str, _fraction: float | None, kind: str = kind) -> None:
            if what == kind:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(stop)
        assert not list((tmp_path / "tmp").iterdir()), kind
        assert not (tmp_path / "out.onnx").exists()
    assert source.SerializeToString() == before


def test_refused_leaves_an_existing_output_alone(tmp_path: Path) -> None:
    made = program(mlp())
    (tmp_path / "out.onnx").write_bytes(b"what was there")
    with pytest.raises(CipmError):
        cipm_ir.optimize(
            ir.to_proto(made.emit()), ["compress{params=0.01}"], data=rows(60), output=tmp_path / "out.onnx"
        )
    assert (tmp_path / "out.onnx").read_bytes() == b"what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def test_the_check_sees_what_is_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the last check: a program whose readers kept their weights is refused."""
    made, data = program(mlp()), rows(200)
    result = compress(made, data, params=0.6)
    kept = {made.space(name): index for name, index in result.witness["kept"].items()}
    context = Context(data=data)
    with pytest.raises(VerificationError, match="Removing units that nothing reads changed the outputs"):
        compress_module._check(made, made.restrict(kept), context)
    compress_module._check(made, made.restrict(kept), Context(data=data, verify=False))


def test_only_so_many_samples_are_read() -> None:
    """Data that would not fit in memory comes in pieces, and no more of it is asked for than samples says."""

    class Endless:
        """Gives samples for ever, and counts how many were taken from one iterator."""

        most = 0

        def __iter__(self) -> Any:
            rng = np.random.default_rng(0)
            for number in range(10**9):
                Endless.most = max(Endless.most, number)
                yield {"x": rng.standard_normal((16, 6)).astype(np.float32)}

    made = program(mlp())
    result = compress(made, Endless(), params=0.7, samples=128, probes=64)
    assert result.changed and Endless.most <= 40
    dense = values(made, rows(100, seed=3))[0]
    assert gap(dense, values(result.program, rows(100, seed=3))[0]) < 0.5
