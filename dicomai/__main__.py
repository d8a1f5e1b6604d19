"""python -m dicomai."""

from dicomai.cli import main

main()
