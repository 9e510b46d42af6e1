"""The row steps in torch, on cache-sized blocks of rows. ``kernels`` has the same functions in Triton."""
