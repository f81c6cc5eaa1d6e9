"""Makes one image with stable-diffusion.cpp, in the environment that has it: client.py JSON OUT.png.

JSON names the files (`diffusion_model_path`, `clip_l_path`, `t5xxl_path`, `vae_path`) and how the image is sampled
(`prompt`, `width`, `height`, `steps`, `guidance`, `seed`). Noise is that of torch's CPU generator.
"""

import json
import sys

FILES = ("diffusion_model_path", "clip_l_path", "t5xxl_path", "vae_path")


def main() -> None:
    from stable_diffusion_cpp import StableDiffusion

    asked, out = json.loads(sys.argv[1]), sys.argv[2]
    model = StableDiffusion(
        **{name: asked[name] for name in FILES if name in asked},
        vae_decode_only=True,
        rng_type="cpu",
        sampler_rng_type="cpu",
        n_threads=int(asked.get("threads", -1)),
    )
    (image,) = model.generate_image(
        prompt=asked.get("prompt", ""),
        width=asked["width"],
        height=asked["height"],
        sample_steps=asked["steps"],
        guidance=asked["guidance"],
        seed=asked["seed"],
        cfg_scale=1.0,
        sample_method="euler",
    )
    image.save(out)


if __name__ == "__main__":
    main()
