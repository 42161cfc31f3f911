"""Prints docs/rules.md."""

from mup_jax.transfer.tables import rules_page

if __name__ == "__main__":
    print(rules_page(), end="")
