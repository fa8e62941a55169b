"""hypothesis, or where it is not installed a stand-in that skips the tests with drawn cases."""

import pytest

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Anything:
        """Every attribute of it, and every call, is itself."""

        def __getattr__(self, _):
            return self

        def __call__(self, *_, **__):
            return self

    st = HealthCheck = _Anything()

    def given(**_):
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(*_, **__):
        return lambda test: test

else:
    settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, print_blob=True)
    settings.load_profile("deterministic")

__all__ = ["HealthCheck", "given", "settings", "st"]
