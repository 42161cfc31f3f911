"""The scaling ladder: tune at the smallest rung, transfer by rule, compare at every rung."""
