"""Budgeted sampling: the state machine of budgets, random draws, jitted programs, the engine."""
