"""The command that installs completion. The app names it by path, because its signature takes time to read.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

from cyclopts.completion.install import create_install_completion_command

from atoll.cli.app import app

install = create_install_completion_command(app.install_completion, add_to_startup=True)
