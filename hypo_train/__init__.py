"""A lean training loop for SFT, DPO, IPO and HyPO on the kernels of :mod:`hypo_kernels`."""
