"""Fixtures for every test."""

from hypothesis import settings

# Machines that run tests are busy; how long an example took says nothing here.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

pytest_plugins = ["tests.redis_server", "tests.tiny"]
