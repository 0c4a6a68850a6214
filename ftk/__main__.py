"""`python -m ftk` is the `ftk` command."""

from ftk.cli.app import main

main()
