"""`python -m pion_hf.cli` is the command `pion-hf`."""

from pion_hf.cli import main

if __name__ == "__main__":
    main()
