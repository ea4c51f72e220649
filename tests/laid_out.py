"""Stacks of matrices in every layout that kernels must take, inside larger buffers whose other entries tell tales."""

import torch

LAYOUTS = ("rows", "columns", "sliced", "batch last")
_MARGIN = 64


def laid_out(values, layout, fill=torch.nan):
    """Put `values (n, d, m)` into a buffer filled with `fill`.

    Returns:
        The stack, a view, and the buffer.
    """
    n, d, m = values.shape
    if layout == "sliced":
        buffer = values.new_full((n + 1, d + 3, m + 5), fill)
        view = buffer[:n, 1 : 1 + d, 2 : 2 + m]
    else:
        buffer = values.new_full((values.numel() + 2 * _MARGIN,), fill)
        inner = buffer[_MARGIN : _MARGIN + values.numel()]
        view = {
            "rows": lambda: inner.view(n, d, m),
            "columns": lambda: inner.view(n, m, d).mT,
            "batch last": lambda: inner.view(d, m, n).permute(2, 0, 1),
        }[layout]()
    return view.copy_(values), buffer


def intact(view, buffer, fill):
    """Whether what is around a view is as it was, filled with a number."""
    around = buffer.clone()
    around.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(fill)
    return bool((around == fill).all())
