"""What all tests share: one thread per process, and hypothesis without clocks or chance."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a bare host, which runs tests/gpu alone
    pass
else:
    # A machine under load takes as long as it takes, and the same examples come in every run.
    settings.register_profile(
        "tests",
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("tests")
