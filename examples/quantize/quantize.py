"""Quantize a float ONNX model to eight bits with onnxruntime, after `expose` and `equalize` have prepared its weights.

    python examples/quantize/quantize.py [model.onnx calibration.npz [folder for the results, default: out]]

1. `cipm_ir.optimize` with calibration data: batch norms are folded, then every hidden unit is rescaled by a power of
   two, and its consumers by the inverse, such that weights and activations are easy to quantize. The function stays the
   same bit by bit; only the numbers in the file change, so that any quantizer may follow.
2. onnxruntime's static quantization (QDQ, signed bytes), per tensor and per channel, on the same data.
3. Both are run: with a step per tensor, where ranges of units differ most, the prepared model loses least.

Without arguments: the digit classifier beside, whose images come with scikit-learn, as it is; and once more with every
hidden unit in other units of measurement, as training without normalization may leave them. The function is the same,
and a quantizer that takes weights as they come loses it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import cipm_ir

MODEL = Path(__file__).parents[1] / "digits" / "digits.onnx"
PLAIN = ["fold-batch-norm"]
PREPARED = ["expose", "equalize"]
BATCH = 64


class Batches(CalibrationDataReader):
    """Feeds onnxruntime's calibration with slices of arrays by input name."""

    def __init__(self, data: Mapping[str, np.ndarray]) -> None:
        self.parts = self._parts(data)

    @staticmethod
    def _parts(data: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        count = min(len(array) for array in data.values())
        for k in range(0, count, BATCH):
            yield {name: array[k : k + BATCH] for name, array in data.items()}

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next feeds; None at the end."""
        return next(self.parts, None)


@dataclass(frozen=True)
class Bench:
    """A float model and what to compare its versions on."""

    model: Path
    calibration: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    labels: np.ndarray | None = None


def run(path: Path, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """First output of a file in onnxruntime."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(feeds))[0])


def quantized(source: Path, data: Mapping[str, np.ndarray], *, per_channel: bool) -> Path:
    """Static quantization of a file; the result lies beside it."""
    target = source.with_name(f"{source.stem}-int8-{'channel' if per_channel else 'tensor'}.onnx")
    quantize_static(
        source,
        target,
        Batches(data),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )
    return target


def compare(bench: Bench, folder: Path) -> None:
    """Prepare, quantize, and print what is left of the float model's outputs."""
    wanted = run(bench.model, bench.test)
    print(f"{'weights':<12}{'steps':<14}{'error':>10}{'agreement':>11}{'accuracy':>10}")
    if bench.labels is not None:
        print(f"{'float':<36}{'':>11}{np.mean(wanted.argmax(-1) == bench.labels):>10.2%}")
    for name, passes, data in (("as they are", PLAIN, None), ("equalized", PREPARED, bench.calibration)):
        path = folder / f"{bench.model.stem}-{name.replace(' ', '-')}.onnx"
        cipm_ir.optimize(bench.model, passes, data=data, output=path)
        for per_channel in (False, True):
            found = run(quantized(path, bench.calibration, per_channel=per_channel), bench.test)
            error = np.square(found - wanted).sum() / np.square(wanted).sum()
            same = np.mean(found.argmax(-1) == wanted.argmax(-1))
            right = "" if bench.labels is None else f"{np.mean(found.argmax(-1) == bench.labels):.2%}"
            steps = "per channel" if per_channel else "per tensor"
            print(f"{name:<12}{steps:<14}{error:>10.5f}{same:>11.2%}{right:>10}")


# ---------------------------------------------------------------- what is quantized
def from_files(model: str, calibration: str) -> Bench:
    """A model of your own and inputs for it: arrays by input name, the first axis counts samples; no labels."""
    with np.load(calibration) as file:
        data = {name: file[name] for name in file.files}
    return Bench(Path(model), data, data)


def digits() -> Bench:
    """The digit classifier, calibration images, and the test images that examples/digits/train.py kept aside."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    scaled = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    train, test, _, answers = train_test_split(scaled, labels, test_size=0.25, random_state=0, stratify=labels)
    return Bench(MODEL, {"images": train[:256]}, {"images": test}, answers)


def in_other_units(bench: Bench, folder: Path) -> Bench:
    """The same function with every hidden unit rescaled at random, and its consumers by the inverse."""
    program = cipm_ir.optimize(bench.model, PLAIN).program
    rng = np.random.default_rng(0)
    moved = program.act({space: space.random(rng, power_of_two=True) for space in program.spaces})
    path = folder / f"{bench.model.stem}-moved.onnx"
    moved.save(str(path))
    return Bench(path, bench.calibration, bench.test, bench.labels)


def main() -> None:
    """Read the command line; without arguments, take the digit classifier."""
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime's hints
    given = dict(enumerate(sys.argv))
    folder = Path(given.get(3, "out"))
    folder.mkdir(parents=True, exist_ok=True)
    if 2 in given:
        compare(from_files(given[1], given[2]), folder)
        return
    bench = digits()
    print(f"=== {bench.model.name}, on {len(bench.test['images'])} test images")
    compare(bench, folder)
    print("\n=== the same function, its hidden units rescaled at random")
    compare(in_other_units(bench, folder), folder)
    print(f"\nwritten to {folder}/")


if __name__ == "__main__":
    main()
