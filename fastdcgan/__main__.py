"""`python -m fastdcgan`."""

import sys

from fastdcgan.cli import main

if __name__ == "__main__":
    sys.exit(main())
