"""A command with the tests' own size of the network, SMALL: python tests/small.py train.py --model P/2 ...
And in a process of its own that need not import anything any more: see `forked`.
"""
import os
import pathlib
import runpy
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import model  # noqa: E402

SMALL = "P/2"  # for tests of what does not depend on it
model.SIZES[SMALL] = (2, 48, 2, 1)


def forked(root, argv, environment, out, err):
    """The target of a forked process: the command argv in the folder root, its output into the files."""
    for file, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(environment)
    os.chdir(root)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
