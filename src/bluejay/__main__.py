"""`python -m bluejay` is `bluejay`."""

from bluejay.cli import main

main()
