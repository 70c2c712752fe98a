"""The Triton backend, for GPUs: one file for each family of kernels; ``ops`` puts the kernels together as the ops."""
