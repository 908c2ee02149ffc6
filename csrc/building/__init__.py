"""What setup.py and `make wheels` build with; no part of the installed package."""
