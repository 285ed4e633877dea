"""`python -m bench`, the same command as `fused-adam-bench`. No logic here."""

import sys

try:
    from .cli import main
except KeyboardInterrupt:  # Python starts, and a user changes his mind
    print("fused-adam-bench: interrupted", file=sys.stderr)
    sys.exit(130)

sys.exit(main())
