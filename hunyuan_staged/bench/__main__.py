"""python -m hunyuan_staged.bench."""

from hunyuan_staged.bench.command import main

if __name__ == "__main__":
    main()
