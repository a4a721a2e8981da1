"""What goes wrong by the user's hand."""


class UserError(Exception):
    """Something the user can put right; its text is all they need."""
