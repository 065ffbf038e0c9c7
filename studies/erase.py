"""Copy a folder tree with the depth and normals of some columns unknown, to see what a model makes of them.

    python studies/erase.py --data data/real/livingroom-train --columns 0:64 --out data/real/erased-train
    python studies/erase.py --data data/real/livingroom-test --columns 64:171 --out data/real/erased-test
"""
import pathlib
import shutil

import numpy as np
from PIL import Image
from record import ROOT  # noqa: F401

from distributed import check, command_parser, run
from trees import find_pictures


def main():
    parser = command_parser(__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True, metavar="TREE")
    parser.add_argument("--columns", required=True, metavar="FIRST:LAST", help="the last is not erased")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    check(not args.out.exists(), f"--out {args.out}: is there; use another one")
    shutil.copytree(args.data, args.out)
    columns = slice(*map(int, args.columns.split(":")))
    for m in ("depth", "normal"):
        for path in find_pictures(args.out / m):
            values = np.array(Image.open(path))
            values[:, columns] = 0
            Image.fromarray(values).save(path)


if __name__ == "__main__":
    run(main)
