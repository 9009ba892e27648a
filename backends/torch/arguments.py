"""Arguments of a GraphModule with names that its code means otherwise: `torch`, `device`, `pytree`, `len`.

The code that fx writes for a graph calls functions by their names, and an argument of the same name stands before
them: `torch.relu` is then an attribute of a tensor. Where that can happen, the function is written twice: one that has
the arguments by their names, as a caller gives them, and one that has the code and arguments of other names.
"""

from __future__ import annotations

import ast
import builtins
from typing import Any

from torch import fx
from torch.fx import graph as fx_graph

_INNER = "_forward_of_graph"


def part_arguments(graph: fx.Graph) -> None:
    """Let no argument of the graph's function hide what its code calls, in place; callers see no difference.

    An argument called ``self`` can only be given by position: torch's own call has that name.
    """
    codegen = graph._codegen
    tree = codegen.pytree_info if isinstance(codegen, fx_graph._PyTreeCodeGen) else None
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    given = {str(node.target).lstrip("*") for node in inputs}
    given.update(name for name in (() if tree is None else tree.orig_args) if name != "self")
    used = _names_in_code(graph)
    hidden = sorted(given & used)
    if not hidden:
        return
    taken = {*used, *given, *(node.name for node in graph.nodes)}
    renamed: dict[str, str] = {}
    for name in hidden:
        fresh = next(n for k in range(len(taken) + 1) if (n := f"{name}_argument{k or ''}") not in taken)
        taken.add(fresh)
        renamed[name] = fresh
    for node in inputs:
        bare = str(node.target).lstrip("*")
        node.target = str(node.target).removesuffix(bare) + renamed.get(bare, bare)
        if node.name == "self":  # fx lets a value have the name of the module
            node._rename("self_value")
    if tree is None:
        graph._codegen = _Parted(renamed)
    else:
        own = [name if name == "self" else renamed.get(name, name) for name in tree.orig_args]
        graph._codegen = _PartedTree(tree._replace(orig_args=own), renamed)


def _names_in_code(graph: fx.Graph) -> set[str]:
    """Return what the code may call by a name of one word: what fx imports, and functions of Python."""
    found = {"self", *fx_graph._custom_builtins}
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and getattr(builtins, name, None) is node.target:
            found.add(name)
    return found


def _outer(text: str, renamed: dict[str, str]) -> str:
    """Return a function with the caller's names that calls the one whose head is given, and that head."""
    old = {new: name for name, new in renamed.items()}
    head, _, rest = text.partition("\n")
    function = ast.parse(f"{head} pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    passed: list[ast.expr] = []
    for argument in [*arguments.posonlyargs, *arguments.args]:
        argument.arg = "self_" if argument.arg == "self" and "self" in renamed else old.get(argument.arg, argument.arg)
        passed.append(ast.Name(argument.arg))
    if arguments.vararg is not None:
        arguments.vararg.arg = old.get(arguments.vararg.arg, arguments.vararg.arg)
        passed.append(ast.Starred(ast.Name(arguments.vararg.arg)))
    keywords = []
    for argument in arguments.kwonlyargs:
        own, argument.arg = argument.arg, old.get(argument.arg, argument.arg)
        keywords.append(ast.keyword(own, ast.Name(argument.arg)))
    if arguments.kwarg is not None:
        arguments.kwarg.arg = old.get(arguments.kwarg.arg, arguments.kwarg.arg)
        keywords.append(ast.keyword(None, ast.Name(arguments.kwarg.arg)))
    function.body = [ast.Return(ast.Call(ast.Name(_INNER), passed, keywords))]
    own_head = head.replace(f"def {function.name}(", f"def {_INNER}(", 1)
    return "\n".join([ast.unparse(ast.fix_missing_locations(function)), own_head, *([rest] if rest else [])])


class _Parted(fx_graph.CodeGen):
    def __init__(self, renamed: dict[str, str]) -> None:
        super().__init__()
        self.renamed = renamed

    def gen_fn_def(self, free_vars: list[str], *args: Any, **kwargs: Any) -> str:
        return _outer(super().gen_fn_def(free_vars, *args, **kwargs), self.renamed)


class _PartedTree(fx_graph._PyTreeCodeGen):
    def __init__(self, tree: Any, renamed: dict[str, str]) -> None:
        super().__init__(tree)
        self.renamed = renamed

    def gen_fn_def(self, free_vars: list[str], *args: Any, **kwargs: Any) -> str:
        return _outer(super().gen_fn_def(free_vars, *args, **kwargs), self.renamed)
