"""Owners of blocks over several processes: which rank holds and works on what, and how tensors travel."""
