"""`python -m shoestring`: the same as the `shoestring` command."""

from shoestring.cli.main import main

if __name__ == "__main__":
    main()
