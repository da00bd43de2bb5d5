"""Rows and SQL: the only place that knows tables. Everything outside sees frozen values through `Store` and `UnitOfWork`."""
