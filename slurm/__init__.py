"""slurm: how a run meets a cluster.

Here: reading what a launcher or SLURM says of this process; a job's script (render.py, templates/), handing it to SLURM
(submit.py, the only file that starts programs), and whether a job that ended goes on (verdict.py). Not here: torch, the
model, the data. Imports configs only. SLURM_* variables are read in environ.py and nowhere else.
"""
