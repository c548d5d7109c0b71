"""`python -m numbabuf`: the command line of `cli`, nothing else."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
