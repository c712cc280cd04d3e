"""Array mathematics of the method: pure functions that jit, one sequence [T] at a time."""
