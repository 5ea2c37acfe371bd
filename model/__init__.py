"""model: the mathematics, written for one rank that owns everything.

Here: plain torch modules and their kernels. Not here: ranks, process groups, device indices, optimizers, files.
Imports configs only. `parallel` changes these modules from outside (weights sliced, dispatchers swapped).
"""
