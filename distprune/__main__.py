"""`python -m distprune`."""

import sys

from distprune.cli import main

sys.exit(main())
