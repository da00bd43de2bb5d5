"""Shard groups: one replica spread over several nodes of one site. Who may be together, who is chosen, and when a group is over.

`plan.plan_groups` is what planning calls; `words` are the values that go in and come out.
"""
