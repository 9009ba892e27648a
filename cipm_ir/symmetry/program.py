"""`Program`: a model with its symmetry analysis, and the four primitives that change weights.

Programs are immutable for their users: `act`, `restrict`, `absorb` and `refit` return new ones, which share every
tensor that did not change.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from cipm_ir.algebra import DenseElement, Element, Group
from cipm_ir.errors import CipmError, SymmetryError
from cipm_ir.ir.bodies import is_control_flow, merge_bodies, nodes_in_order, put_home
from cipm_ir.ir.input_shapes import InputShapes, fix_input_shapes, note_input_shapes, noted_sizes
from cipm_ir.ir.labels import Array
from cipm_ir.ir.lifted import held_weights, lift_weights, put_back
from cipm_ir.ir.opsets import name_standard_domain
from cipm_ir.ir.parameters import is_parameter, note_ir_version, overridable_inputs
from cipm_ir.ir.shapes import forget_impossible_sizes
from cipm_ir.ir.stand_ins import share_sizes
from cipm_ir.ir.strided import has_detours, remove_detours
from cipm_ir.symmetry.analysis import Analysis, gc_paused
from cipm_ir.symmetry.counting import Count, count_macs
from cipm_ir.symmetry.dense import LinearityTable
from cipm_ir.symmetry.leaves import OpaqueNode
from cipm_ir.symmetry.naming import describe_spaces
from cipm_ir.symmetry.primitives.absorb import absorb_edits, merged_edits
from cipm_ir.symmetry.primitives.act import act_edits
from cipm_ir.symmetry.primitives.apply import Editor
from cipm_ir.symmetry.primitives.edits import Edit
from cipm_ir.symmetry.primitives.restrict import closed_keep, restrict
from cipm_ir.symmetry.space import Space


class Origin(Protocol):
    """Where a program came from; knows how to write the same kind of thing.

    It may also have ``compare(a, b, *, data, seed)``, which runs two models the way that the source would run and gives
    a `Verification`; without it, onnxruntime runs them.
    """

    def write(self, model: ir.Model, path: str) -> None:
        """Write a model the way it came in."""


class Program:
    """A model, its annotations, and the primitives. Build one with `cipm_ir.load` or `Program.of`."""

    def __init__(
        self,
        model: ir.Model,
        *,
        source: ir.Model | None = None,
        origin: Origin | None = None,
        analysis: Analysis | None = None,
    ) -> None:
        self._model = model
        self._source = source
        self._origin = origin
        self._analysis = analysis
        self.fits = False
        """The shapes of what is written were checked, and do not contradict each other."""

    @classmethod
    def of(
        cls,
        model: ir.Model,
        *,
        origin: Origin | None = None,
        input_shapes: InputShapes | None = None,
        fix_shapes: bool = False,
        own: bool = False,
    ) -> Program:
        """Program of an ONNX model; the model itself is never changed, unless it is the program's ``own`` from now on.

        ``input_shapes``: sizes of dynamic dimensions for analysis, costs and verification; with ``fix_shapes`` the
        program declares them.

        For the analysis functions are inlined, weights in Constant nodes become initializers (`cipm_ir.ir.lifted`),
        bodies of If, Loop and Scan hold none and share no names (`cipm_ir.ir.bodies`), and gathers that give a value
        back as it is are taken out (`cipm_ir.ir.strided`); what `emit` gives keeps all of them until something else
        than values changes.
        """
        clone = model if own else model.clone()
        note_ir_version(clone)
        name_standard_domain(clone)
        forget_impossible_sizes(clone.graph)
        if input_shapes is not None:
            note_input_shapes(clone.graph, input_shapes)
        if fix_shapes:
            fix_input_shapes(clone.graph)
        read = InlinePass()(clone.clone()).model if clone.functions else clone
        if has_detours(read):
            read = read.clone()
            if not remove_detours(read) and not clone.functions:
                read = clone
        if next(held_weights(read.graph), None) is not None:
            read = read.clone() if read is clone else read
            lift_weights(read)
        if any(is_control_flow(node) for node in read.graph):
            read = read.clone() if read is clone else read
            merge_bodies(read)
        return cls(read, source=None if read is clone else clone, origin=origin)

    # ------------------------------------------------------------ reading
    @property
    def model(self) -> ir.Model:
        """The graph that is analysed (functions inlined). Not to be changed."""
        return self._model

    @property
    def source_model(self) -> ir.Model:
        """The model as `emit` gives it, functions kept, without the copy. Not to be changed."""
        return self._source or self._model

    @property
    def written(self) -> ir.Model:
        """Deprecated name of `source_model`."""
        warnings.warn("Program.written is now Program.source_model.", DeprecationWarning, stacklevel=2)
        return self.source_model

    @property
    def origin(self) -> Origin | None:
        """Where it came from."""
        return self._origin

    @property
    def analysis(self) -> Analysis:
        """The symmetry analysis, made when first needed."""
        if self._analysis is None:
            self._analysis = Analysis.of(self._model)
            if self._source is not None:  # what is made of it need not search for sizes again
                share_sizes(self._model, self._source)
        return self._analysis

    @cached_property
    def spaces(self) -> tuple[Space, ...]:
        """All spaces, in graph order; blocks after the units."""
        analysis = self.analysis
        notes, levels = describe_spaces(analysis), LinearityTable(analysis, self._model)
        blocks: dict[int, tuple[int, int]] = {}
        for k, raw in enumerate(analysis.spaces):
            if raw.kind == "blocks" or raw.table.shape[1] > 1:
                for row, block in enumerate(raw.table[:, 0].tolist()):
                    blocks.setdefault(block, (k, row))
        held = [(raw.kind != "blocks", raw.parent_class >= 0) for raw in analysis.spaces]  # behind what holds them
        order = sorted(range(len(held)), key=held.__getitem__)
        by_index: dict[int, Space] = {}
        for k in order:
            raw, free, note = analysis.spaces[k], analysis.directions[k], notes[k]
            n = len(raw.table)
            group = Group(n, permutes=raw.kind != "cells", scales=free.scales, signs=free.signs)
            parent = None
            if raw.parent_class in blocks and blocks[raw.parent_class][0] in by_index:
                where, row = blocks[raw.parent_class]
                parent = (by_index[where], row)
            by_index[k] = Space(note.name, raw.kind, n, group, note.members, free.exact, parent, levels, k)
        return tuple(by_index[k] for k in range(len(analysis.spaces)))

    def space(self, name: str) -> Space:
        """Return a space by name, with or without the leading @."""
        found = self._by_name.get(name.removeprefix("@"))
        if found is not None:
            return self.spaces[found]
        raise SymmetryError(f"There is no space named {name!r}; print(program) or program.spaces lists them.")

    def index(self, space: Space) -> int:
        """Position of a space among `spaces`."""
        found = self._by_name.get(space.name)
        if found is None or self.spaces[found].size != space.size:
            raise SymmetryError(
                f"Space @{space.name} of size {space.size} is not one of this program's spaces; use program.spaces."
            )
        return found

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {s.name: k for k, s in enumerate(self.spaces)}

    @property
    def opaque(self) -> tuple[OpaqueNode, ...]:
        """Nodes that pinned something, and why."""
        return tuple(self.analysis.walk.opaque)

    def count(self, sizes: Mapping[str, int] | None = None) -> Count:
        """Return multiply-accumulates of one run, with the nodes that could not be counted.

        Args:
            sizes: of dynamic dimensions, by name, where none are suggested (`input_shapes=`); the others count at the
                stand-ins of `cipm_ir.symmetry.counting`.
        """
        key = tuple(sorted((sizes or {}).items()))
        counts = self.analysis.counts
        if key not in counts:
            shapes = self.analysis.walk.shapes
            known = {**shapes.only, **(sizes or {}), **noted_sizes(self._model.graph)}
            counts[key] = count_macs(self._model, known, shapes.first)
        return counts[key]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run, as far as they could be counted, at stand-in sizes; see `count`."""
        return self.count().total

    def unseen(self, space: Space) -> str:
        """Return why values that hold the units of a space cannot be looked at over data; empty where they can."""
        body = self.analysis.bodies[self.index(space)]
        return f"the body {body} uses its units, and values inside bodies cannot be looked at" if body else ""

    @property
    def overridable(self) -> tuple[str, ...]:
        """Inputs with a default: initializers that are graph inputs too (IR version 4 on). They are pinned."""
        return tuple(value.name or "" for value in overridable_inputs(self._model))

    @property
    def parameters(self) -> int:
        """Entries of all floating-point parameters that the main graph uses."""
        seen = {}
        for leaf in self.analysis.walk.leaves:
            if leaf.dtype.is_floating_point():
                seen[leaf.name] = math.prod(leaf.shape)
        return sum(seen.values())

    def __str__(self) -> str:
        from cipm_ir.symmetry.text import render

        return render(self)

    def text(self, *, fold: bool = False) -> str:
        """Return the annotated graph, as `str` does; with ``fold``, blocks of nodes that repeat themselves once."""
        from cipm_ir.symmetry.text import render

        return render(self, fold=fold)

    def to_networkx(self) -> Any:
        """Return spaces and tensors as a bipartite `networkx.Graph`; see `cipm_ir.symmetry.text.to_networkx`."""
        from cipm_ir.symmetry.text import to_networkx

        return to_networkx(self)

    # ------------------------------------------------------------ primitives
    def act(self, elements: Mapping[Space, Element | DenseElement]) -> Program:
        """Apply an element to each of some spaces, with the dual on consumers. Computes the same function.

        A `DenseElement` acts on a space whose ``dense`` group holds it.

        Raises:
            SymmetryError: an element that is not in the space's group.
        """
        chosen: dict[int, Element | DenseElement] = {}
        for space, element in elements.items():
            index = self.index(space)
            group = self.spaces[index].group
            if isinstance(element, DenseElement):
                self.spaces[index].check_dense(element)
            elif element not in group:
                raise SymmetryError(
                    f"The element on {element.n} classes is not in the group {group} of space @{space.name}; "
                    "space.random(rng) and space.identity() give elements that are."
                )
            chosen[index] = element
        return self._edited(act_edits(self.analysis, chosen))

    def restrict(self, keep: Mapping[Space, Array | Sequence[int]]) -> Program:
        """Drop classes: per space, the sorted indices of those that stay. Exact only for units that contribute nothing.

        Raises:
            SymmetryError: blocks would become uneven or a space empty.
        """
        stays = self.kept_classes(keep)
        with gc_paused():
            clone = self._model.clone()
            restrict(clone, self.analysis, stays)
        return Program(clone, origin=self._origin)

    def kept_classes(self, keep: Mapping[Space, Array | Sequence[int]]) -> np.ndarray:
        """Per class, whether it stays: what `keep` drops goes with everything that cannot stay without it."""
        stays = np.ones(self.analysis.classes.count, bool)
        for space, indices in keep.items():
            index = np.asarray(indices, np.int64)
            if (
                index.ndim != 1
                or (np.diff(index) <= 0).any()
                or (index.size and (index[0] < 0 or index[-1] >= space.size))
            ):
                raise SymmetryError(
                    f"keep for @{space.name} must be sorted indices within 0..{space.size - 1}, each once."
                )
            if not index.size:
                raise SymmetryError(f"keep for @{space.name} is empty; keep at least one unit.")
            drop = np.setdiff1d(np.arange(space.size), index)
            stays[self.analysis.spaces[self.index(space)].table[drop]] = False
        return closed_keep(self.analysis, stays)

    def absorb(self, space: Space, keep: Array | Sequence[int], mixing: Array, shift: Array | None = None) -> Program:
        """Replace the hidden vector h by ``mixing @ h[keep] + shift``: consumers take W @ mixing and b + W @ shift.

        ``mixing`` has shape (size, len(keep)), ``shift`` (size,). Every consumer must contract the space with a weight.
        The result holds ``mixing`` until it is written: as bytes where it comes as uint8, else in double precision.
        """
        index, matrix = np.asarray(keep, np.int64), np.asarray(mixing)
        matrix = matrix if matrix.dtype == np.uint8 else matrix.astype(np.float64)
        edits, biases = absorb_edits(self.analysis, self._model, self.index(space), index, matrix, shift)
        clone = self._model.clone()
        editor = Editor(clone, self.analysis)
        editor.apply(edits)
        for bias in biases:
            bias.write(editor)
        mixed = Program(clone, origin=self._origin)
        if len(index) == space.size:
            return mixed
        twin = next((s for s in mixed.spaces if s.name == space.name and s.size == space.size), None)
        if twin is None:
            raise SymmetryError(f"Space @{space.name} did not survive the mixing of its consumers.")
        return mixed.restrict({twin: index})

    def mix(self, mixings: Mapping[Space, Array]) -> Program:
        """Replace the hidden vector h of each of some spaces by ``mixing @ h``, at unchanged sizes.

        The same as `absorb` for one space after the other with all units kept, with one copy of the graph in all.

        Args:
            mixings: (size, size) for each space; uint8 where it only selects and adds up.

        Raises:
            SymmetryError: a consumer of a space is no product with a weight of its own.
        """
        parts = []
        for space, matrix in mixings.items():
            exact = matrix if matrix.dtype == np.uint8 else matrix.astype(np.float64)
            parts.append(
                absorb_edits(self.analysis, self._model, self.index(space), np.arange(space.size), exact, None)[0]
            )
        return self._edited(merged_edits(parts))

    def refit(self, weights: Mapping[str, Array]) -> Program:
        """Set the values, not the shapes, of named parameters. For approximate passes."""
        clone = self._model.clone()
        set_values(clone, weights)
        return Program(clone, origin=self._origin, analysis=self._analysis, source=self._with_values(clone))

    def _edited(self, edits: dict[int, Edit]) -> Program:
        clone = self._model.clone()
        before = set(clone.graph.initializers)
        count = len(nodes_in_order(clone.graph))
        editor = Editor(clone, self.analysis)
        editor.apply(edits)
        editor.sweep()
        same = set(clone.graph.initializers) == before and len(nodes_in_order(clone.graph)) == count
        if not same:
            return Program(clone, origin=self._origin)
        return Program(clone, source=self._with_values(clone), origin=self._origin, analysis=self._analysis)

    def _with_values(self, changed: ir.Model) -> ir.Model | None:
        """Return the source with functions, holding the changed values; None where a value lives inside a function."""
        if self._source is None:
            return None
        clone, before = self._source.clone(), self._model.graph.initializers
        for name, value in changed.graph.initializers.items():
            own, tensor = clone.graph.initializers.get(name), value.const_value
            if name in before and before[name].const_value is tensor:
                continue
            if own is not None:
                own.const_value = tensor
            elif tensor is None or not (put_home(clone.graph, value) or put_back(clone.graph, name, tensor)):
                return None
        return clone

    # ------------------------------------------------------------ writing
    def emit(self, *, annotate: bool = False) -> ir.Model:
        """Return the model, as a fresh `onnx_ir.Model`.

        With ``annotate``, groups are written into ``metadata_props``.
        """
        model = self.source_model.clone()
        if annotate:
            from cipm_ir.symmetry.text import annotate_model

            annotate_model(self, model)
        return model

    def save(self, path: str, *, annotate: bool = False) -> None:
        """Write the model to ``path``: beside first, then renamed, so that no half-written file is left."""
        if self._origin is None:
            raise CipmError("This program was made from an object in memory; load it with cipm_ir.load to save it.")
        self._origin.write(self.emit(annotate=annotate), path)


def set_values(model: ir.Model, weights: Mapping[str, Array]) -> None:
    """Set the values of named parameters of a model that nothing else holds.

    Raises:
        SymmetryError: there is no such parameter, or its shape is another one.
    """
    for name, array in weights.items():
        value = model.graph.initializers.get(name)
        if value is None or value.const_value is None or not is_parameter(value):
            also = " (it is an input with a default, which a caller may replace)" if value is not None else ""
            raise SymmetryError(f"There is no parameter named {name!r} to refit{also}.")
        old = tuple(value.const_value.shape.numpy())
        if tuple(array.shape) != old:
            raise SymmetryError(
                f"refit of {name!r}: shape {tuple(array.shape)} is not {old}; use restrict to change shapes."
            )
        dtype = value.const_value.dtype
        value.const_value = ir.Tensor(np.asarray(array).astype(dtype.numpy()), dtype=dtype, name=name)
