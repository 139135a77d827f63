"""`python -m lasar_hf` is the `lasar` command."""

from lasar_cli import run


if __name__ == "__main__":
    run()
