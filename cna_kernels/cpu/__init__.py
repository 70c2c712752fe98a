"""The CPU backend: the ctypes binding of ``csrc`` and its launchers."""
