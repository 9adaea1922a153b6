"""python -m hunyuan_staged.compare."""

import sys

from hunyuan_staged.compare.command import main

if __name__ == "__main__":
    sys.exit(main())
