"""``python -m bkd_fast``: the command line."""

from bkd_fast.cli import main

raise SystemExit(main())
