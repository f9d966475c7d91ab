"""The errors a user can cause; every message says what is wrong, the value seen, and what to do."""


class SigmaError(ValueError):
    """A user's mistake or an unusable file; the message is one or two plain sentences."""


class CheckpointError(SigmaError):
    """A file or folder that is not a usable PixArt-Σ checkpoint or component."""
