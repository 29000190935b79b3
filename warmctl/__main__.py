"""The command line, `warmctl` or `python -m warmctl`: see `warmctl.command`."""

from __future__ import annotations

import sys

try:
    import rich.table  # noqa: F401
    import typer  # noqa: F401
except ImportError as error:
    sys.exit(f'the command line of warmctl needs typer and rich ({error}): pip install "warmctl[cli]"')

from warmctl.command.app import app


def main() -> None:
    app()


if __name__ == "__main__":
    main()
