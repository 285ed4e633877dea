"""`python -m bench`, the same command as `fused-adam-bench`. No logic here."""

import sys

try:
    from .cli import main  # imports torch, which takes seconds in which a user may change his mind
except KeyboardInterrupt:
    print("fused-adam-bench: interrupted", file=sys.stderr)
    sys.exit(130)

sys.exit(main())
