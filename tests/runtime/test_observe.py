"""Models run over data: limits are kept to the sample, errors count from the right one, progress ends at one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from tests.runtime.test_verify import build

from cipm_ir.errors import InputError
from cipm_ir.runtime.activations.cache import ActivationCache
from cipm_ir.runtime.activations.observe import observe, samples

FLOAT = TensorProto.FLOAT
Array = np.ndarray[Any, Any]


def network(first: int | str = "N") -> Any:
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Neg", ["r"], ["y"])]
    return build(nodes, {"x": (FLOAT, [first, 3])}, {"y": (FLOAT, [first, 3])})


def drawn(count: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(0).standard_normal((count, 3)).astype(np.float32)}


def noted(shown: list[float | None]) -> Callable[[str, float | None], None]:
    return lambda _, done: shown.append(done)


@pytest.mark.parametrize(
    ("first", "limit", "sizes"), [("N", 10, [8, 2]), ("N", 5, [5]), ("N", 16, [8, 8]), (4, 5, [4, 4])]
)
def test_a_limit_is_kept(first: int | str, limit: int, sizes: list[int], tmp_path: Path) -> None:
    data, model = drawn(30), network(first)
    np.savez(tmp_path / "d.npz", **data)  # type: ignore[arg-type]
    pieces = [{"x": data["x"]}, {"x": data["x"]}]
    for given in (data, tmp_path / "d.npz", pieces, iter(pieces)):
        shown: list[float | None] = []
        found = list(observe(model, ["r"], given, size=8, limit=limit, progress=noted(shown)))
        assert [samples(feeds) for feeds, _ in found] == sizes
        assert shown[-1] == 1
        np.testing.assert_array_equal(np.concatenate([v["r"] for _, v in found]), data["x"][: sum(sizes)].clip(0))
    with ActivationCache(model, data, size=8, limit=limit) as frontier:
        assert frontier.samples == sizes
        outs = [out["y"] for out in frontier.tail(model, ["y"])]
    np.testing.assert_array_equal(np.concatenate(outs), -data["x"][: sum(sizes)].clip(0))


def test_progress_without_a_number_of_samples() -> None:
    def stream() -> Iterator[dict[str, Array]]:
        yield drawn(4)
        yield drawn(4)

    shown: list[float | None] = []
    assert len(list(observe(network(), ["r"], stream(), progress=noted(shown)))) == 2
    assert shown == [None, None]


def test_errors_count_from_the_start() -> None:
    data = drawn(12)
    data["x"][9] = np.inf
    for start, words in ((0, "samples 8 to 11"), (100, "samples 108 to 111")):
        with pytest.raises(InputError, match=words):
            list(observe(network(), ["r"], data, size=4, start=start))
    with pytest.raises(InputError, match="no samples"):
        list(observe(network(), ["r"], data, limit=0))
    with pytest.raises(InputError, match="no samples"):
        ActivationCache(network(), data, limit=0)
