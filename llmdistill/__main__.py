"""`python -m llmdistill`."""

from llmdistill.cli import main

if __name__ == "__main__":
    main()
