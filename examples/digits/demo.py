"""Inspect, canonicalize, prune and compress a small digit classifier, and measure what each step does to it.

    python examples/digits/demo.py [folder for the results, default: out]

Reads digits.onnx beside this file (see train.py) and takes its test images from scikit-learn; needs no torch.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import cipm_ir

MODEL = Path(__file__).with_name("digits.onnx")
CANONICAL = ["canonicalize"]
SMALLER = ["fold-batch-norm", "remove-dead"]
PRUNED = {"pruned-80": "prune{macs=0.8}", "pruned-50": "prune{macs=0.5}"}
COMPRESSED = {"compressed-50": "compress{macs=0.5}", "compressed-25": "compress{macs=0.25}"}


@dataclass(frozen=True)
class Row:
    """One line of the final table."""

    file: Path
    parameters: int
    macs: int
    accuracy: float
    error: float | None


def splits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training images, and the images that train.py kept aside with their labels; float32 [N, 1, 8, 8] in 0..1."""
    images, labels = load_digits(return_X_y=True)
    scaled = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, test_x, _, test_y = train_test_split(scaled, labels, test_size=0.25, random_state=0, stratify=labels)
    return train_x, test_x, test_y


def accuracy(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of the images that onnxruntime classifies correctly with the model in this file."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits = np.asarray(session.run(None, {"images": images})[0])
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def title(text: str) -> None:
    """Print a heading."""
    print(f"\n=== {text}")


def show_symmetry() -> None:
    """What the analysis finds, and that moving along the symmetry changes the weights but not the function."""
    program = cipm_ir.load(MODEL)
    title("1. The symmetry of the model")
    for space in program.spaces:
        print(f"{space}   moves {len(space.members)} axes of its tensors")
    print(f"{len(program.opaque)} nodes are opaque to the analysis")

    rng = np.random.default_rng(0)
    moved = program.act({space: space.random(rng, power_of_two=True) for space in program.spaces})
    title("2. A random element of that group: other weights, the same function")
    print("outputs:     ", cipm_ir.verify(program, moved))
    print("fingerprints:", cipm_ir.fingerprint(program)[:16], "and", cipm_ir.fingerprint(moved)[:16])


def write_models(folder: Path, calibration: np.ndarray) -> dict[Path, cipm_ir.Result]:
    """Run the pipelines; each one writes its model."""
    made: dict[Path, cipm_ir.Result] = {}
    title("3. Exact passes: canonical form; batch normalizations folded, dead units removed")
    for name, passes in (("canonical", CANONICAL), ("smaller", SMALLER)):
        path = folder / f"digits-{name}.onnx"
        made[path] = cipm_ir.optimize(MODEL, passes, output=path)
        print(made[path].report)
    title("4. Pruning: whole units, by the size of their weights, without data and without training")
    for name, prune in PRUNED.items():
        path = folder / f"digits-{name}.onnx"
        # Pruned first: the size of a weight means most in the scales that training chose, before anything is folded.
        made[path] = cipm_ir.optimize(MODEL, [prune, *SMALLER], output=path)
        print(made[path].report)
    title(f"5. Compression: the same sizes, made up for by least squares on {len(calibration)} images without labels")
    for name, compress in COMPRESSED.items():
        path = folder / f"digits-{name}.onnx"
        passes = [*SMALLER, "cluster", compress]
        made[path] = cipm_ir.optimize(MODEL, passes, data={"images": calibration}, output=path)
        print(made[path].report)
    page = folder / "report.html"
    last = made[folder / "digits-compressed-50.onnx"]
    last.report.to_html(page, title="digits: clustered and compressed to half the multiply-accumulates")
    print(f"the last steps, with pictures of every space: {page}")
    return made


def print_table(rows: list[Row]) -> None:
    """Sizes, accuracy and error of every model."""
    print(f"{'file':<24}{'bytes':>10}{'parameters':>12}{'MACs':>14}{'accuracy':>10}{'max |Δ|':>10}")
    for row in rows:
        error = "" if row.error is None else f"{row.error:.1e}"
        print(
            f"{row.file.name:<24}{row.file.stat().st_size:>10,}{row.parameters:>12,}{row.macs:>14,}"
            f"{row.accuracy:>10.2%}{error:>10}"
        )


def main() -> None:
    """Run the demo; the results go to the folder given on the command line."""
    start = time.perf_counter()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    folder.mkdir(parents=True, exist_ok=True)
    show_symmetry()
    calibration, images, labels = splits()
    made = write_models(folder, calibration)

    title(f"6. Test accuracy through onnxruntime, {len(labels)} images that were not trained on")
    first = next(iter(made.values())).report.before
    rows = [Row(MODEL, first.parameters, first.macs, accuracy(MODEL, images, labels), None)]
    for path, result in made.items():
        after = result.report.after
        rows.append(Row(path, after.parameters, after.macs, accuracy(path, images, labels), result.report.error))
    print_table(rows)
    print(f"\nwritten to {folder}/ in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
