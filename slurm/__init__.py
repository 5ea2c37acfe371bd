"""slurm: how a run meets a cluster.

Here: reading what a launcher or SLURM says of this process. Not here: torch, the model, the data.
Imports configs only. SLURM_* variables are read in environ.py and nowhere else.
"""
