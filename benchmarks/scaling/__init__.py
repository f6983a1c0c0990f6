"""Elastic capacity on ServeGen's m-small: the controller, an autoscaling rule, static capacity, and a bound."""
