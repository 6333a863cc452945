"""The same operations as Triton kernels, one a file; nothing outside imports them where Triton is missing."""
