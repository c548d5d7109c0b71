"""`python -m numbabuf`: the command line of `cli`, nothing else."""

import sys

from .tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
