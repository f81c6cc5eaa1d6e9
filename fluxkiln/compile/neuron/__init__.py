"""AWS Neuron: torch modules lowered to HLO protos, made canonical, checked, and executed as replicas."""
