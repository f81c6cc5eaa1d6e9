"""Training on a checkpoint: LoRAs of its transformer, with diffusers' loss, peft's adapters, accelerate's processes."""
