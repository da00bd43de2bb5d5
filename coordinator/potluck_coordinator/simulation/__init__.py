"""A pool in a virtual hour: modelled nodes, homes and users around the deciding functions that the live pool runs."""
