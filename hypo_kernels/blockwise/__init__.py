"""The row steps in torch, on cache-sized blocks of rows. ``hypo_kernels.kernels`` holds them in Triton."""
