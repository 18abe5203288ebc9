"""Stands in for the fork of transformers that LeRobot 0.4's pi0 and pi0.5 need, which no package registry has.

What the fork adds to Gemma, LeRobot 0.6 brings itself, in its `pi_gemma.py`; that file is loaded into the 0.4
environment under the names that 0.4 expects.
"""

import copy
import importlib.util
import os
import sys
import types


def install() -> None:
    """Call before LeRobot 0.4's pi0 is imported; `PI_GEMMA` names LeRobot 0.6's file."""
    spec = importlib.util.spec_from_file_location("pi_gemma", os.environ["PI_GEMMA"])
    pi_gemma = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pi_gemma)
    causal_mask = pi_gemma.create_causal_mask  # one of its arguments has another name today
    pi_gemma.create_causal_mask = lambda inputs_embeds, **rest: causal_mask(
        input_embeds=inputs_embeds, **rest
    )
    check = types.ModuleType("transformers.models.siglip.check")
    check.check_whether_transformers_replace_is_installed_correctly = lambda: True
    sys.modules[check.__name__] = check
    import transformers.models.siglip
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi05 import modeling_pi05
    from transformers.models.gemma import modeling_gemma
    from transformers.models.paligemma.modeling_paligemma import PaliGemmaModel

    transformers.models.siglip.check = check
    modeling_gemma._gated_residual = pi_gemma._gated_residual

    scaled = (
        PaliGemmaModel.get_image_features
    )  # the fork leaves the division out, as today's transformers does
    PaliGemmaModel.get_image_features = lambda self, pixels: (
        scaled(self, pixels) * self.config.text_config.hidden_size**0.5
    )

    def keeping_the_cache(denoise_step):
        """The fork's attention reads past keys without adding to them."""

        def step(*args, past_key_values, **kwargs):
            return denoise_step(*args, past_key_values=copy.deepcopy(past_key_values), **kwargs)

        return step

    for model in (modeling_pi0.PI0Pytorch, modeling_pi05.PI05Pytorch):
        model.denoise_step = keeping_the_cache(model.denoise_step)
    for module in (modeling_pi0, modeling_pi05):
        module.PaliGemmaForConditionalGeneration = pi_gemma.PaliGemmaForConditionalGenerationWithPiGemma
        module.GemmaForCausalLM = pi_gemma.PiGemmaForCausalLM
