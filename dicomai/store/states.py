"""Which state may follow which; what is not listed here raises."""

OPEN = ("pending", "sending", "committing")  # deliveries that are not at an end

# None: the row is new. The same state twice: a lease ran out and the work was claimed again.
TRANSITIONS: dict[str, dict[str | None, frozenset[str]]] = {
    "study": {
        None: frozenset({"receiving", "skipped"}),
        "receiving": frozenset({"analyzing", "failed"}),
        "analyzing": frozenset({"analyzing", "analyzed", "skipped", "failed", "receiving"}),
        "analyzed": frozenset({"receiving"}),
        "skipped": frozenset({"receiving"}),
        "failed": frozenset({"receiving"}),
    },
    "delivery": {
        None: frozenset({"pending"}),
        "pending": frozenset({"sending", "superseded"}),
        "sending": frozenset(
            {"sending", "committing", "delivered", "failed", "pending", "superseded"}
        ),
        # The peer has stored it; whether it commits itself to it is not yet known.
        "committing": frozenset({"delivered", "failed", "pending", "superseded"}),
        "delivered": frozenset(),
        "failed": frozenset({"pending"}),
        "superseded": frozenset({"pending"}),
    },
    "model": {
        None: frozenset({"active", "candidate"}),
        "candidate": frozenset({"active"}),
        "active": frozenset({"retired", "withdrawn"}),
        "retired": frozenset({"active"}),
        "withdrawn": frozenset({"active"}),  # rolled back: never what a rollback goes back to
    },
    "training": {
        None: frozenset({"running"}),
        # Stopped: by a person or at the end of its hours; running again: where it left off.
        "running": frozenset({"running", "stopped", "done", "failed"}),
        "stopped": frozenset({"running", "failed"}),
        "done": frozenset(),
        "failed": frozenset(),
    },
    "task": {
        None: frozenset({"due"}),
        "due": frozenset({"running"}),
        "running": frozenset({"running", "done", "failed"}),
        "done": frozenset(),
        "failed": frozenset(),
    },
}


def check(subject: str, before: str | None, after: str) -> None:
    """Raise ValueError unless a subject may go from one state to the other."""
    if after not in TRANSITIONS[subject].get(before, frozenset()):
        raise ValueError(f"a {subject} cannot go from {before} to {after}")
