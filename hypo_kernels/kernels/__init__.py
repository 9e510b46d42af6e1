"""The Triton kernels and their launchers. Only ``tiles`` can be imported without Triton."""
