"""A LeRobot plugin (`--discover_packages_path=tiny_vla`) that makes pi0 and pi0.5 small enough for CPU tests.

LeRobot looks the sizes of both up by name, and its configs accept no other names. So what `gemma_300m` and
`gemma_2b` mean is changed here, and the vision tower with them. The same in `lerobot-train`, in Ray's workers and
in LeRobot 0.4.4.
"""

from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi05 import modeling_pi05

WORDS = 300


def _shrunk(build):
    def shrink_and_build(config):
        text = getattr(config, "text_config", config)
        text.vocab_size = WORDS
        vision = getattr(config, "vision_config", None)
        if vision is not None:
            config.image_token_index = config.image_token_id = WORDS - 1
            vision.hidden_size = vision.intermediate_size = 32
            vision.num_hidden_layers, vision.num_attention_heads = 1, 2
            config.projection_dim = vision.projection_dim = text.hidden_size
        return build(config)

    return shrink_and_build


for module in (modeling_pi0, modeling_pi05):
    size = module.GemmaConfig(width=32, depth=2, mlp_dim=64, num_heads=8, num_kv_heads=1, head_dim=8)
    module.get_gemma_config = lambda variant, size=size: size
    # The classes are called `...WithPiGemma` in 0.6.1, as in transformers in 0.4.4.
    for name in (
        "PaliGemmaForConditionalGenerationWithPiGemma",
        "PiGemmaForCausalLM",
        "PaliGemmaForConditionalGeneration",
        "GemmaForCausalLM",
    ):
        if getattr(module, name, None) is not None:
            setattr(module, name, _shrunk(getattr(module, name)))
