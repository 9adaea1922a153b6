"""python -m hunyuan_staged.download."""

import sys

from hunyuan_staged.download.command import main

if __name__ == "__main__":
    sys.exit(main())
