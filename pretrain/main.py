"""Train: `deepspeed pretrain/main.py --config configs/demo.yaml [section.key=value ...]`.

Runs the same under `deepspeed`, `torchrun`, `srun` and plain `python`. Exit codes: 0 done, 1 failed, 2 bad input or
machine, 3 stopped on request with its state saved (start again to go on).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    # Started as a script, Python looks for modules in this folder first; the rooms lie one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED, RankFailed, UserError
from configs.run import RunConfig
from pretrain.arguments import train_arguments
from pretrain.status import mark_done, starting_up
from slurm.environ import LaunchEnv, submitted


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, build, train; returns the exit code."""
    parsed = train_arguments(arguments)
    # Read when torch is loaded: its C++ stack traces of lost connections would bury the one error that tells.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    env = None
    try:
        env = LaunchEnv.read()
        config = RunConfig.load(parsed.config, parsed.overrides)
        # Of a command that somebody typed, nothing is on record before it is known to be sound.
        with starting_up(Path(config.run_dir), env.rank) if submitted() else contextlib.nullcontext():
            return train(config, env)
    except RankFailed as error:
        return error.exit_code
    except UserError as error:
        if env is None or env.rank == 0:  # every rank meets the same error; one tells it
            print(f"\n{error}\n", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT


def train(config: RunConfig, env: LaunchEnv) -> int:
    # Imported late: a misspelt key is told in half a second, not after torch and deepspeed have come up.
    with contextlib.redirect_stdout(sys.stderr):  # where deepspeed's log is to go; it binds to stdout otherwise
        from pretrain import loop
        from pretrain.build import build

    with build(config, env) as run:
        code = loop.train(run)
        run.status.step = run.state.step
        if code == EXIT_DONE and env.rank == 0:
            mark_done(Path(config.run_dir), run.state.step)
    run.status.write("done" if code == EXIT_DONE else "stopped")
    return code


def leave(code: int) -> NoReturn:
    """End the process; after a failure at once."""
    if code in (EXIT_DONE, EXIT_STOPPED):
        sys.exit(code)
    sys.stdout.flush()
    os._exit(code)  # libraries' threads could wait for ranks that are gone; others see the closed connections at once


if __name__ == "__main__":
    leave(main())
