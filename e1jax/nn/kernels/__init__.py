"""Kernels for accelerators (Pallas), one a file; attention and sampling choose them."""
