"""The whole way on real images, in one command: python examples/demo.py --out out/demo (the same as ``vico demo``)."""

import sys

from vico_ext.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
