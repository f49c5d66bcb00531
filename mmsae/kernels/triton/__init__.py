"""Triton kernels of a training step: functions of tensors that know neither autograd nor SAEs.

``select`` chooses entries of a dense product, ``sparse`` has the products of a sparse code with a dictionary, ``optim``
the optimiser's step on rows. Results do not depend on the run: sums have a fixed order, and counts are whole numbers.
Nothing waits for the device. With ``TRITON_INTERPRET=1`` in the environment before triton is imported, everything takes
tensors on the CPU.

What a step moves, by arithmetic, for 16,384 rows of width 1,024, 32,768 latents, k = 32, tables, inputs and the product
in bfloat16 and gradients in float32. Rows that are gathered come mostly from the L2 cache, which holds much of a table:

======================  ========  ===========  =============  ====================================================
call                    launches  memory (GB)  gathered (GB)  of which
======================  ========  ===========  =============  ====================================================
select.topk             2         1.18         0.05           the product once; maxima; 32 groups of 64 bytes a row
sparse.decode_residual  1         0.17         1.07           atoms; target, reconstruction, residual
sparse.sampled          1         0.07         1.07           the same atoms
sparse.segments         torch's   0.05                        sort of 524,288 ids of 32 bits
sparse.scatter_pair     2         0.27         3.2            a bfloat16 and a float32 row an entry; both gradients
optim.adam_rows_        1         1.0                         each of two tables: 4 in, 3 and a bfloat16 copy out
======================  ========  ===========  =============  ====================================================

A residual that is cast to bfloat16 before ``scatter_pair`` takes a third off what that gathers. Sums by latent that go
straight into the step, in one kernel that keeps no gradients, would save 0.54 GB. Group maxima in the epilogue of the
product would save reading 1.07 GB, if a product written in Triton lost less than that against cuBLAS.
"""
