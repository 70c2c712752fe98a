"""The Triton backend, for GPUs: one file for each family of kernels; ``mlp`` puts them together as the ops."""
