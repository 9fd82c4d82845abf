"""Trains a stage: python train.py --help."""

import sys

from ldm.cli import door, train

if __name__ == "__main__":
    sys.exit(door(train, sys.argv[1:]))
