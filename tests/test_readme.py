"""The tables are those of results/*.json, and the README is of its field's length."""
import subprocess
import sys

from conftest import ROOT


def test_tables_are_what_the_results_say():
    done = subprocess.run([sys.executable, "studies/tables.py", "--check"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_readme_is_read_in_ten_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 2400
    assert len(text.splitlines()) <= 260
