"""What is stored, refreshed and applied: the method protocol, factors, scalings, and the operators that show them."""
