"""The tables are those of results/*.json, and the README is of its field's length."""
import re
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


def test_the_edits_of_the_readme_fit_the_code():
    """Each line that a diff keeps or takes away is a line of the file that it names."""
    file, lines = None, []
    for block in re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        for line in block.splitlines():
            if line.startswith("@@"):
                file = line.split()[1].rstrip(":")
                lines = (ROOT / file).read_text().splitlines()
            elif not line.startswith("+") and line.strip():
                assert line[1:] in lines, (file, line)
    assert file
