"""The one exception for a user's mistake: it ends the program with one clear line and exit code 2."""


class RecipeError(Exception):
    """Bad input, or a disk that cannot take the output. The message is all that the user sees."""
