"""The tables are those of results/*.json, and the README is of its field's length."""
import re
import sys
import types

from conftest import ROOT


def test_tables_are_what_the_results_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "studies")
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    import tables
    tables.main()


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


def test_a_verdict_needs_three_seeds_of_both_rows(monkeypatch):
    """Two spreads are two standard errors of three seeds each; of fewer they come by chance."""
    monkeypatch.syspath_prepend(ROOT / "studies")
    import verdicts
    claim = verdicts.Claim("said", "ours", "theirs", ("FD",))
    columns = {"FD": types.SimpleNamespace(more=False)}
    three, higher = [1, 2, 3], [9, 10, 11]
    for ours, theirs, said in ((three, higher, "holds"), (higher, three, "does not"),
                               (three, [1.5, 2.5, 3.5], "cannot be told"), ([1, 2], higher, "of two seeds"),
                               ([1, 1, 1], [1, 1, 1], "cannot be told"), ([1, 1, 1], [2, 2, 2], "holds"),
                               (three, [9], "of one seed"), ([], [9], "not measured")):
        by, seeds = verdicts.ahead_by(claim, "FD", {"ours": {"FD": ours}, "theirs": {"FD": theirs}}, columns)
        assert claim.verdict(by, seeds) == said
        spread = max((max(values) - min(values)) / 2 for values in (ours, theirs)) if by else 0
        assert not spread or by == (sum(theirs) / len(theirs) - sum(ours) / len(ours)) / spread
