"""The control plane: knows every node, decides what runs where, and is the only writer of the database."""
