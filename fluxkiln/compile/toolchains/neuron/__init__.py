"""neuronx-cc, for AWS Trainium and Inferentia: modules of all cores, their shards, the compiler."""
