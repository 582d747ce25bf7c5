"""`python -m draftcli`: what torchrun and accelerate launch start."""

from draftcli.cli import main

main()
