"""python -m hunyuan_staged.verify."""

import sys

from hunyuan_staged.verify.command import main

if __name__ == "__main__":
    sys.exit(main())
