"""Decisions as plain synchronous functions over frozen values: no clock, no I/O, no protobuf, no rows."""
