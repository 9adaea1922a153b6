"""python -m hunyuan_staged.gallery."""

import sys

from hunyuan_staged.gallery.command import main

if __name__ == "__main__":
    sys.exit(main())
