"""Triton kernels of a training step: functions of tensors that know neither autograd nor SAEs.

``select`` chooses entries of a dense product, ``sparse`` has the products of a sparse code with a dictionary, ``optim``
the optimiser's step on rows. Results do not depend on the run: sums have a fixed order, and counts are whole numbers.
Nothing waits for the device. With ``TRITON_INTERPRET=1`` in the environment before triton is imported, everything takes
tensors on the CPU.
"""
