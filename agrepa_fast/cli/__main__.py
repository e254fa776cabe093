"""`python -m agrepa_fast.cli`, which launchers call."""

from . import main

main()
