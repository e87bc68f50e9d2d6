"""`python -m clustermim` is the same as the command `clustermim`."""

from clustermim.cli import main

if __name__ == "__main__":
    main()
