"""What the Triton kernels share: launches, launch sizes, the maths of a softmax."""
