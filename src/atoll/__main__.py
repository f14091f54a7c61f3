"""`python -m atoll`, and so `torchrun -m atoll`: the same as `atoll`."""

import sys

from atoll.cli import main

sys.exit(main())
