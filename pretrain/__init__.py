"""pretrain: composes the other rooms into a run.

Here: main.py and the `glam` command line, the loop, the run folder, budgets, pictures. `build.py` is the only place
that constructs. Arguments are parsed in cli.py only, metric sinks live in metrics.py only, signals in stop_signals.py.
Nobody imports this room.
"""
