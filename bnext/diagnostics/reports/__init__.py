"""A diagnosis as text, JSON, SARIF and a page, and what of the facts they show."""
