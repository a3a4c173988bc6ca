"""The program `latch-train`: says which package is missing, before anything is imported that needs it.

Its one rule: nothing but that. It must not know the command line, which is `__main__.py`.
"""


def main() -> None:
    """Run the command line."""
    try:
        from training.__main__ import main as run
    except ModuleNotFoundError as missing:
        raise SystemExit(
            f"latch-train: {missing.name} is not installed, which training needs: `make setup`, or "
            "`pip install '.[cpu,train]' -c requirements/constraints.txt`"
        ) from None
    run()
