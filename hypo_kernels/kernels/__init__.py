"""The Triton kernels and their launchers. ``tiles`` alone can be imported without Triton."""
