"""What was spent, on what, by whom: totals that are kept, and the reports, exports and comparisons made of them."""
