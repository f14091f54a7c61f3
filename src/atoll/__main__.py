"""`python -m atoll`, and so `torchrun -m atoll`: the same as `atoll`.

Tests: tests/surface/test_cli.py
"""

import sys

from atoll.cli import main

sys.exit(main())
