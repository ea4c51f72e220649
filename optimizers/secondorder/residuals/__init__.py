"""Least-squares losses by their residuals: what a closure returns, and derivatives of all residuals at once."""
