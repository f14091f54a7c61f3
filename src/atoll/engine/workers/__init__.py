"""Worker processes and Ray actors: the scheduler, the pool and their messages.

Tests: tests/parity/test_processes.py, tests/parity/test_ray.py
"""
