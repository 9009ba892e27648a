"""The four primitives that change weights (`act`, `restrict`, `absorb`, `refit`), and edits of a graph."""
