"""Many runs beside each other: budgets, the rows of Table 1, one switch at a time."""
