"""Why an item cannot be rendered."""


class Unrenderable(ValueError):
    """The message says what is missing or wrong, in words for whoever wrote the object."""
