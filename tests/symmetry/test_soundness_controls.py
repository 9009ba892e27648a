"""Negative controls of test_soundness.py: one event of the walk is dropped, and the differential run must notice.

Each model is analysed again and again, each time without one unification, one pin, one sign or one scale equation, and
a random element of the group that comes out is applied. A drop is *caught* when the output changes, and *redundant*
when the analysis comes out the same, because other events imply the dropped one; nothing else is allowed, but for a
short list with reasons. Besides, one tensor is left where it was, or scaled
by the inverse instead of its dual.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
from tests import zoo
from tests.symmetry.test_soundness import acted, largest_change, program_of, random_elements

from cipm_ir.errors import CipmError
from cipm_ir.ir.labels import Labels
from cipm_ir.ops.events import Recorder
from cipm_ir.symmetry import program as program_module
from cipm_ir.symmetry import walk as walk_module
from cipm_ir.symmetry.primitives.act import act_edits
from cipm_ir.symmetry.primitives.edits import Edit
from cipm_ir.symmetry.program import Program

MODELS = (
    "mlp_relu",
    "mlp_tanh",
    "gated_mlp",
    "hidden_output",
    "residual_blocks",
    "conv_flatten_gemm",
    "grouped_conv",
    "depthwise",
    "squeeze_excitation",
    "batch_norm_relu",
    "rms_norm",
    "concat_relu",
    "attention_separate",
    "attention_rope_table",
    "lstm",
)
KINDS = ("unify", "pin", "scale", "sign")
# Events without which the analysis claims more, and rightly so, in a way that the rules leave alone.
UNNEEDED = {
    ("residual_blocks", "sign"): "the sign of a variance's scale is squared away, so a sign of its own acts as nothing",
    ("batch_norm_relu", "sign"): "as in residual_blocks",
    ("attention_separate", "unify"): "softmax does not see a bias of the keys: it adds the same to every key's score",
}
DROPS = 12
VISIBLE = 1e-4
"""Relative change that counts as caught: ten times what soundness allows."""


class Dropping(Recorder):
    """Records everything but the event number ``index`` of one kind; ``count`` says how many there were."""

    kind = ""
    index = -1
    count = 0

    @classmethod
    def drops(cls) -> bool:
        cls.count += 1
        return cls.count - 1 == cls.index

    def unify(self, a: Labels, b: Labels) -> None:
        before = len(self.unifications)
        super().unify(a, b)
        if self.kind == "unify" and len(self.unifications) > before and self.drops():
            self.unifications.pop()

    def pin(self, labels: Labels, reason: str) -> None:
        super().pin(labels, reason)
        if self.kind == "pin" and labels.size and self.drops():
            self.pins.pop()

    def equate(
        self, labels: Labels, terms: tuple[tuple[int, int], ...], *, scale: bool = True, sign: bool = True
    ) -> None:
        before = len(self.equations)
        super().equate(labels, terms, scale=scale, sign=sign)
        if len(self.equations) == before:
            return
        last = self.equations[-1]
        if self.kind == "scale" and scale and self.drops():
            self.equations[-1] = replace(last, scale=False)
        elif self.kind == "sign" and sign and self.drops():
            self.equations[-1] = replace(last, sign=False)


@pytest.fixture
def dropping(monkeypatch: pytest.MonkeyPatch) -> type[Dropping]:
    """The recorder of every walk from now on; set ``kind`` and ``index`` on it."""
    monkeypatch.setattr(walk_module, "Recorder", Dropping)
    monkeypatch.setattr(Dropping, "kind", "")
    monkeypatch.setattr(Dropping, "index", -1)
    return Dropping


@dataclass(frozen=True)
class Trial:
    """One model, its inputs and its outputs."""

    name: str
    model: onnx.ModelProto
    inputs: dict[str, Any]
    before: list[Any]

    @classmethod
    def of(cls, name: str) -> Trial:
        model = zoo.build_or_skip(name)
        inputs = zoo.feeds(name, model)
        return cls(name, model, inputs, zoo.run(model, inputs))

    def change(self, program: Program) -> float:
        """How much a random element changes the output; infinite where it cannot even be applied."""
        worst = 0.0
        for seed in range(2):
            try:
                moved = acted(program, random_elements(program, seed))
                worst = max(worst, largest_change(self.before, zoo.run(moved, self.inputs)))
            except (CipmError, ValueError, IndexError):
                return float("inf")
        return worst


def portrait(program: Program) -> Any:
    """All that the analysis claims, comparable between walks that allocate the same atoms."""
    analysis = program.analysis
    return [
        (s.kind, str(s.group), raw.table.shape, sorted(first_atoms(analysis.classes.of, raw.table[:, 0])), s.exact)
        for s, raw in zip(program.spaces, analysis.spaces, strict=True)
    ]


def first_atoms(of: Labels, classes: Labels) -> list[tuple[int, ...]]:
    return [tuple(np.flatnonzero(of == c).tolist()) for c in classes.tolist()]


def verdicts(trial: Trial, kind: str, dropping: type[Dropping]) -> Counter[str]:
    """What became of each dropped event (a dozen, spread over the walk)."""
    dropping.kind, dropping.index, dropping.count = kind, -1, 0
    whole = program_of(trial.model)
    assert trial.change(whole) <= 1e-5, "nothing was dropped yet"
    expected, total = portrait(whole), dropping.count
    out: Counter[str] = Counter()
    for k in np.unique(np.linspace(0, total - 1, min(total, DROPS)).astype(int)).tolist():
        dropping.index, dropping.count = k, 0
        program = program_of(trial.model)
        if trial.change(program) > VISIBLE:
            out["caught"] += 1
        elif portrait(program) == expected:
            out["redundant"] += 1
        else:
            out["unneeded"] += 1
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_dropped_event_is_caught(name: str, kind: str, dropping: type[Dropping]) -> None:
    found = verdicts(Trial.of(name), kind, dropping)
    assert found["caught"] >= 1
    assert not found["unneeded"] or (name, kind) in UNNEEDED


INVISIBLE = {("attention_separate", "b_17")}
"""The bias of the keys: softmax does not see it, whatever its gauge."""


def only_signs(edit: Edit) -> bool:
    """A sign is its own inverse."""
    return all(bool((np.abs(s) == 1).all()) for s in (*edit.scale.values(), *edit.inner_scale.values()))


def inverted(edit: Edit) -> Edit:
    """The tensor scaled by the inverse: what comes of taking g where its dual belongs, or the other way round."""
    return replace(
        edit,
        scale={axis: 1.0 / s for axis, s in edit.scale.items()},
        inner_scale={axis: 1.0 / s for axis, s in edit.inner_scale.items()},
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_tensor_that_does_not_follow_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial.of(name)
    program = program_of(trial.model)
    edits_of = act_edits
    elements = random_elements(program)
    chosen = {program.index(space): element for space, element in elements.items()}
    for leaf, edit in edits_of(program.analysis, chosen).items():
        what = program.analysis.walk.leaves[leaf].name

        def without(*args: Any, leaf: int = leaf) -> dict[int, Edit]:
            return {k: e for k, e in edits_of(*args).items() if k != leaf}

        def undual(*args: Any, leaf: int = leaf) -> dict[int, Edit]:
            return {k: inverted(e) if k == leaf else e for k, e in edits_of(*args).items()}

        cases = {"left out": without} | ({"inverted": undual} if edit.scale or edit.inner_scale else {})
        for case, patched in cases.items():
            monkeypatch.setattr(program_module, "act_edits", patched)
            after = zoo.run(acted(program, elements), trial.inputs)
            seen = largest_change(trial.before, after) > VISIBLE
            harmless = (name, what) in INVISIBLE or (case == "inverted" and only_signs(edit))
            assert seen != harmless, f"{what} {case}"
