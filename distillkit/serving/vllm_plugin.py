"""vLLM's entry point for plugins (`vllm.general_plugins`): makes students known to it, in each of its processes.

Nothing of vLLM's is imported before vLLM calls `register`, and the model itself not before a student is loaded.
"""

from typing import Any

import distillkit.student.network  # noqa: F401  registers the configuration with transformers
from distillkit.serving.served import check_served

MODEL = "distillkit.serving.vllm_model:KDAHybridForCausalLM"


def register() -> None:
    """Safe to call more than once."""
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    class StudentShapes(ModelArchConfigConvertorBase):
        """A student's heads are those of its teacher's configuration, which stands inside its own."""

        def get_head_size(self) -> int:
            return ModelArchConfigConvertorBase(self.hf_config.base_config, self.hf_config.base_config).get_head_size()

    class StudentChecks(VerifyAndUpdateConfig):
        """Before anything is loaded, in the process that was started."""

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            check_served(model_config.hf_config)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            check_served(
                vllm_config.model_config.hf_config,
                vllm_config.parallel_config.tensor_parallel_size,
                speculative=vllm_config.speculative_config is not None,
            )

    MODEL_ARCH_CONFIG_CONVERTORS["kda_hybrid"] = StudentShapes
    MODELS_CONFIG_MAP["KDAHybridForCausalLM"] = StudentChecks
    ModelRegistry.register_model("KDAHybridForCausalLM", MODEL)
    # vLLM cuts its graphs at the operations that look at the batch; this one of ours is one of them.
    if "vllm::distillkit_kda" not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append("vllm::distillkit_kda")
