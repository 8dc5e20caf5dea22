"""What is said to the user instead of a traceback."""


class Refusal(Exception):
    """Something that the user has to change; its text is the one line that they see."""


def one_line(error: BaseException) -> str:
    """What an exception says, or its kind, in one line that is not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
