"""OpenVINO, on Intel's and other CPUs, GPUs and NPUs: graphs whose weights stay where they are."""
