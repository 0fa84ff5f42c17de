"""`python -m jobs` is the command `agcl`."""

import sys

from jobs.cli import main

sys.exit(main())
