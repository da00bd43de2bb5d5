"""The wire contract, and the little that the roles would otherwise each write again."""
