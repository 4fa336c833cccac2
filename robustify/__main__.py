"""`python -m robustify` is `robustify`."""
from robustify.cli import main

main()
