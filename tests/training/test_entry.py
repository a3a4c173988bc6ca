"""The program says what to install, where a package is missing, and else is the command line."""

import subprocess
import sys

import pytest


def run(before: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`latch-train` with these words, in an interpreter of its own that has run `before`."""
    program = f"import sys; {before}; sys.argv[1:] = {list(words)}; from training.entry import main; main()"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("package", ["torch", "typer"])
def test_a_missing_package_is_one_line_that_says_what_to_do(package: str) -> None:
    """No traceback; exit status 1."""
    done = run(f"sys.modules[{package!r}] = None", "--help")
    assert done.stderr.startswith(f"latch-train: {package} is not installed")
    assert "`make setup`" in done.stderr
    assert done.stderr.count("\n") == done.returncode == 1


def test_else_it_is_the_command_line() -> None:
    """Its own help, and its own refusals."""
    done = run("pass", "--help")
    assert (done.returncode, "Usage" in done.stdout) == (0, True)
