"""What a command imports: only what it uses; and what stands in for a slow import gives the same."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components as by_scipy
from scipy.special import expit
from tests.paths import DIGITS

from cipm_ir.ir import components
from cipm_ir.runtime.intervals.elementwise import _expit

SLOW = ("scipy", "networkx", "torch", "matplotlib", "onnxscript", "sympy.core")


def loaded(code: str) -> set[str]:
    """Which of the slow packages a fresh interpreter has imported after running this."""
    words = f"import json, sys; {code}; print(json.dumps([m for m in {SLOW!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_default_passes_import_nothing_slow() -> None:
    assert loaded("import cipm_ir.api") == set()
    assert loaded(f"import cipm_ir; cipm_ir.optimize({str(DIGITS)!r}, verify=False)") == set()
    assert loaded(f"import cipm_ir; cipm_ir.optimize({str(DIGITS)!r})") == set()
    # A control: what does use it.
    assert "scipy" in loaded(f"import cipm_ir; cipm_ir.optimize({str(DIGITS)!r}, ['equalize'], verify=False)")


def test_a_deferred_module_is_whole_when_it_is_used() -> None:
    assert "sympy.core" in loaded("import cipm_ir.api; import sympy; assert str(sympy.Symbol('x') + 1) == 'x + 1'")
    assert "sympy.core" in loaded("import onnx_ir; import cipm_ir.api")
    sizes = "import cipm_ir.api, onnx_ir as ir; assert str(ir.SymbolicDim('N') + 1) in ('N + 1', 'SymbolicDim(N + 1)')"
    assert "sympy.core" in loaded(sizes)


@pytest.mark.parametrize("many", [0, 1 << 19])
def test_components(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as scipy's, numbers included, whichever way they are found."""
    monkeypatch.setattr(components, "_MANY", many)
    rng = np.random.default_rng(0)
    chain = np.arange(999)
    graphs = [(rng.integers(0, n, m), rng.integers(0, n, m), n) for n, m in ((1, 0), (5, 0), (40, 25), (400, 390))]
    graphs += [(chain, chain + 1, 1000), (rng.permutation(1000)[:-1], rng.permutation(1000)[1:], 1000)]
    for a, b, count in graphs:
        number, label = components.connected_components(a, b, count)
        right = by_scipy(coo_array((np.ones(len(a)), (a, b)), shape=(count, count)), directed=False)
        assert number == right[0] and np.array_equal(label, right[1])


def test_the_logistic_function() -> None:
    numbers = np.concatenate([np.linspace(-800, 800, 4001), [-np.inf, np.inf, -1e-300, 0.0]])
    assert np.allclose(_expit(numbers), expit(numbers), rtol=1e-14, atol=1e-300)
