from bkd_fast.cli import main

raise SystemExit(main())
