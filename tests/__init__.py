"""The tests talk to loopback only, so no proxy of the environment comes between.

What is started by a test gets the proxy that the test names (`tests.e2e.test_proxy`).
"""

import os

for variable in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[variable]
