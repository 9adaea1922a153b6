"""python -m hunyuan_staged.cluster."""

import sys

from hunyuan_staged.cluster.command import main

if __name__ == "__main__":
    sys.exit(main())
