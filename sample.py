"""Draws pictures of prompts: python sample.py --help."""

import sys

from ldm.cli import door, sample

if __name__ == "__main__":
    sys.exit(door(sample, sys.argv[1:]))
