"""Cannot be imported, as a policy of somebody may."""

raise ZeroDivisionError("on import")
