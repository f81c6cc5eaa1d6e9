"""GGUF: files that stable-diffusion.cpp, ComfyUI and diffusers load, one for each component."""
