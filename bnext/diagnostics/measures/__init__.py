"""Numbers that several checks draw from the facts: how much is normalized together, how far apart, how often."""
