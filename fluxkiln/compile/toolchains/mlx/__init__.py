"""MLX: files that mflux and the FLUX example of ml-explore/mlx-examples load."""
