"""A build for targets that cut the model over cores: shards, modules, replicas, and the compiler's own stage."""
