"""Where the tests run: on the CPU, on the emulator in its place, or on a GPU (CROSS_ENTROPY_TEST_DEVICE=cuda)."""

import os

import cross_entropy

DEVICE = os.environ.get("CROSS_ENTROPY_TEST_DEVICE", "cpu")
IS_HOST = DEVICE == "cpu" and not cross_entropy.build_info().emulated
# Whether a target out of bounds is raised by a later call.
DEFERS_ERRORS = not IS_HOST
