"""`python -m trimtab`: the command line without an installed script."""

from trimtab.cli import main

raise SystemExit(main())
