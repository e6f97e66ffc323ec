"""`python -m eqx_lorax` prints what a report of a bug needs."""

from . import info


if __name__ == "__main__":
    print(info())
