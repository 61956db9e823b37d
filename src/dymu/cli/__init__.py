"""The command line: `dymu run`, `calibrate`, `inspect`, `families`, `env`.

torch and transformers are imported by the commands that need them, so `dymu --help` is quick.
"""

from dymu.cli.commands import main

__all__ = ["main"]
