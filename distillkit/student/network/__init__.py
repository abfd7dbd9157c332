"""The student network. These files are saved beside a student's weights, so they import nothing else of distillkit."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import KDAHybridConfig
from .kda_attention import KimiDeltaAttention
from .modeling import KDAHybridForCausalLM, KDAHybridModel

AutoConfig.register("kda_hybrid", KDAHybridConfig)
AutoModel.register(KDAHybridConfig, KDAHybridModel)
AutoModelForCausalLM.register(KDAHybridConfig, KDAHybridForCausalLM)
# Saving writes these files beside the weights, for `trust_remote_code=True` where distillkit is not installed.
KDAHybridConfig.register_for_auto_class()
KDAHybridForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["KDAHybridConfig", "KDAHybridForCausalLM", "KimiDeltaAttention"]
