"""The row steps in torch, a cache-sized block of rows at a time: the counterpart of ``kernels``."""
