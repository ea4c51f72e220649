"""Layers by kind: how each maps to the normal form `a (k, n, s, d_in)`, `g (k, n, s, d_out)` (see `protocol`)."""
