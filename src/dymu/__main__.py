"""`python -m dymu`: the `dymu` command."""

from dymu.cli.main import main

main()
