"""Acting on what `policies/scaling.py` decides: standbys are started, watched, stopped and paid for."""
