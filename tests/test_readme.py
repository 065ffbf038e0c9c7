"""The README's tables are those of results/*.json."""
import subprocess
import sys

from conftest import ROOT


def test_tables_are_what_the_results_say():
    done = subprocess.run([sys.executable, "results/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
