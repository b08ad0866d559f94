"""`python -m trimtab.cli`: the command line without an installed script."""

from trimtab.cli import main

raise SystemExit(main())
