"""python -m hunyuan_staged.bench."""

import sys

from hunyuan_staged.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
