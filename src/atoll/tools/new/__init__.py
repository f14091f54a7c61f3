"""Start a project: a folder with an experiment, a module, a README and a test.

Tests: tests/surface/test_new.py
"""

from atoll.tools.new.project import TEMPLATES, new_project

__all__ = ["TEMPLATES", "new_project"]
