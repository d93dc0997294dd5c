"""The tests, and what is set for all of them before torch is imported, for the processes that they start too."""

import os

# Two threads on any machine: enough for what runs in parallel to do so, and what takes a second here takes about one
# where there are many cores. Passive, because threads that spin while they wait take the cores of the other tests.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
