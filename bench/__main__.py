import sys


def main() -> int:
    """Runs the command line, if what it needs is installed."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("rich", "pydantic"):
            raise
        sys.exit(f'cross-entropy-bench needs {package}: pip install "cross-entropy[bench]"')
    return run()


if __name__ == "__main__":
    sys.exit(main())
