"""Triton kernels, one file per op; import them as rlhf_fast.kernels.

The folder shares its name with a package that other libraries probe for by version, hence the low number.
"""

__version__ = "0.0.0"
