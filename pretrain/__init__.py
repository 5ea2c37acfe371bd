"""pretrain: composes the other rooms into a run.

Here: main.py and the `glam` command line, the loop, the run folder, budgets, pictures. `build.py` is the only place
that constructs; arguments.py alone parses arguments, metrics.py has the metric sinks, stop_signals.py the signals.
Nobody imports this room.
"""
