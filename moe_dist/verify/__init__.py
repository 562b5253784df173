"""The proof that a layout trains the same model: a lattice of layouts and options against one process."""
