"""Differential privacy of a plan: ε of its rounds, the noise for an ε, and the ledger of a run.

Tests: tests/identities/test_accountant.py, tests/identities/test_account.py
"""

from atoll.privacy.account import Account, account, epsilon, noise_for

__all__ = ["Account", "account", "epsilon", "noise_for"]
