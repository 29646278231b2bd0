"""How much a model suffers when one part of it is compressed alone, and what that says about budgets."""
