"""`python -m limbeck_cli`."""

from limbeck_cli import main

main()
