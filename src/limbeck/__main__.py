"""`python -m limbeck`, and so ``torchrun … -m limbeck``: the command line."""

from limbeck_cli import main

main()
