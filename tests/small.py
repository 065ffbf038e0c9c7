"""A command with the tests' own size of the network, SMALL: python tests/small.py train.py --model P/2 ..."""
import pathlib
import runpy
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import model  # noqa: E402

SMALL = "P/2"  # for tests of what does not depend on it
model.SIZES[SMALL] = (2, 48, 2, 1)
if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
