"""`python -m atoll` and `torchrun -m atoll` run the command `atoll`.

Tests: tests/surface/test_cli.py, tests/parity/test_torchrun.py
"""

import sys

from atoll.cli import main

sys.exit(main())
