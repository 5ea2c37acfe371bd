"""The `glam` command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from configs.errors import EXIT_BAD_INPUT, EXIT_DONE, RankFailed, UserError
from pretrain.arguments import glam_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `glam`; returns the exit code."""
    parsed = glam_parser().parse_args(arguments)
    from pretrain import verbs  # late: --help should not wait for torch

    try:
        code = getattr(verbs, parsed.verb)(parsed)
        return EXIT_DONE if code is None else int(code)
    except RankFailed as error:
        return error.exit_code
    except UserError as error:
        print(f"\n{error}\n", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
