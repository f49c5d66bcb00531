"""Triton kernels of a training step: functions of tensors that know neither autograd nor SAEs.

``select`` chooses entries of a dense product, ``sparse`` has the products of a sparse code with a dictionary, ``pairs``
compares two codes, ``optim`` has the optimiser's step on rows. Results do not depend on the run: sums have a fixed
order, and counts are whole numbers. Nothing waits for the device. With ``TRITON_INTERPRET=1`` in the environment before
triton is imported, everything takes tensors on the CPU.

What a step moves, by arithmetic, for 16,384 rows of width 1,024, 32,768 latents, k = 32, tables, inputs and the product
in bfloat16 and gradients in float32. Rows that are gathered come mostly from the L2 cache, which holds much of a table:

=================  ========  ===========  =============  ========================================================
call               launches  memory (GB)  gathered (GB)  of which
=================  ========  ===========  =============  ========================================================
select.topk        2         1.18         0.05           the product once; maxima; 32 groups of 64 bytes a row
sparse.bag         1         0.07         1.07           atoms; reconstruction
sparse.sampled     1         0.07         1.07           the same atoms; gradient of the reconstruction
sparse.segments    torch's   0.05                        sort of 524,288 ids of 32 bits
sparse.scatter     2         0.14         1.07           a bfloat16 row an entry (2.15 for float32); the gradient
optim.adam_rows_   1         0.94                        a table of atoms: 4 in, 3 out
=================  ========  ===========  =============  ========================================================

Sums by latent that go straight into the step, in one kernel that keeps no gradients, would save 0.27 GB a table. Group
maxima in the epilogue of the product would save reading 1.07 GB, if a product written in Triton lost less than that
against cuBLAS.
"""
