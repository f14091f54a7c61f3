"""`python -m atoll.cli`: the same as `atoll`."""

import sys

from atoll.cli import main

sys.exit(main())
