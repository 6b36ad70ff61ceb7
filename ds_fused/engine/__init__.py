"""Everything that says "deepspeed": the JSON block, the hooks, op builders, rank agreement, launcher, injection
policies.
"""
