"""Triton kernels and their launchers. Imported at the first dispatch to one: nothing else here needs Triton."""
