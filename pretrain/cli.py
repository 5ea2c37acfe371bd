"""The `glam` command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from configs.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_INTERRUPTED, RankFailed, UserError
from pretrain.arguments import glam_arguments

_ROOMS = {
    "prep": "pretrain.prep_verbs",
    "checkpoint": "pretrain.checkpoint_verbs",
    "preflight": "pretrain.preflight_verbs",
    "submit": "pretrain.job_verbs",
    "stop": "pretrain.job_verbs",
    "status": "pretrain.job_verbs",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `glam`; returns the exit code."""
    parsed = glam_arguments(arguments)
    try:
        # Late: --help should not wait for torch, and prep needs none.
        room = importlib.import_module(_ROOMS.get(parsed.verb.split()[0], "pretrain.verbs"))
        code = getattr(room, parsed.verb.replace(" ", "_"))(parsed)
        return EXIT_DONE if code is None else int(code)
    except RankFailed as error:
        return error.exit_code
    except UserError as error:
        print(f"\n{error}\n", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        return EXIT_DONE
    except KeyboardInterrupt:
        goes_on = ": the same command goes on from what is done" if parsed.verb == "prep" else ""
        print(f"\nstopped from the keyboard{goes_on}", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
