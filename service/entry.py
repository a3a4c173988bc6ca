"""The program `latch`: says which package is missing, before anything is imported that needs it.

Rule: nothing but that; the command line is `__main__.py`.
"""


def main() -> None:
    """Runs the command line."""
    try:
        from service.__main__ import main as run
    except ModuleNotFoundError as missing:
        raise SystemExit(
            f"latch: {missing.name} is not installed, which the service needs: `make serve`, or `pip install '.[cpu]'`"
        ) from None
    run()
