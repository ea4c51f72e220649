"""The operations in plain tensor operations: readable, for any device, and the specification of every faster path.

Arguments are not checked here; the functions that users call, in the modules named by subject, do that for all paths.
"""
