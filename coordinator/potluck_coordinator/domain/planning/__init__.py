"""What runs where: from deployments, catalogue, nodes and demand to every node's engines. `plan.plan` is the way in, `explain` says why."""
