"""Old names of modules still work, say what the new name is, and lead to the same objects."""

from __future__ import annotations

import importlib
import sys

import pytest
from tests.paths import DIGITS

import cipm_ir
from cipm_ir.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_leads_to_the_same_objects(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if ".torch" in MOVED[old]:
        pytest.importorskip("torch")
    for name in [name for name in sys.modules if name == old or name.startswith("cipm_ir.rules")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.warns(DeprecationWarning, match=f"is now {MOVED[old]}"):
        module = importlib.import_module(old)
    new = importlib.import_module(MOVED[old])
    own = [name for name in vars(new) if not name.startswith("__")]
    assert own and all(getattr(module, name) is getattr(new, name) for name in own)


@pytest.mark.parametrize("name", ["cipm_ir.rules.nothing", "cipm_ir.passes.nothing", "cipm_ir.runtime.verified"])
def test_other_names_are_not_found(name: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_an_old_attribute_warns_and_works() -> None:
    program = cipm_ir.load(DIGITS)
    with pytest.warns(DeprecationWarning, match="source_model"):
        assert program.written is program.source_model
