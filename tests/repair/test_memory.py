"""Freed memory stays with the process."""

import subprocess
import sys

import pytest
from warm import ROOT

FAULTS = """
import resource, torch
from slimming.runtime.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(64 << 18)  # 64 MB, more than glibc's thresholds ever grow to
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = faults()
assert keep_freed_memory() and faults()
print(default, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_memory_that_was_freed_needs_no_new_pages():
    printed = subprocess.check_output([sys.executable, "-c", FAULTS], cwd=ROOT, text=True)
    default, kept = map(int, printed.split())
    assert kept < default / 10
