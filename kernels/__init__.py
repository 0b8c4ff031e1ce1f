"""Triton kernels; imports as `fastdcgan.kernels`."""
