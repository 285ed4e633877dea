"""`python -m bench`, the same command as `fused-adam-bench`. No logic here."""

import sys

from .cli import main

sys.exit(main())
