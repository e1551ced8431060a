"""Whether the tests with T5X run here; as a program it says so in one line."""


def why_skipped() -> str | None:
    """Why they are skipped; None if they run."""
    try:
        import t5x.train  # noqa: F401
    except ImportError as error:
        return f"T5X cannot be imported ({error}); docs/t5x.md says how to get it"
    return None


if __name__ == "__main__":
    reason = why_skipped()
    print("they run" if reason is None else f"SKIPPED: {reason}")
