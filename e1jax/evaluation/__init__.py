"""Accuracy at budgets: completions of files, statistics, tables and a figure."""
