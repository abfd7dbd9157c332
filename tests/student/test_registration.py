"""After `import distillkit` transformers knows students, whichever of both is imported first, and no sooner."""

import subprocess
import sys

KNOWN = (
    "; from transformers import AutoConfig, AutoModelForCausalLM"
    "; AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model('kda_hybrid'))]"
)
SILENCES_NOTHING = (
    "; import distillkit.cli, distillkit.training, logging"
    "; assert logging.getLogger('torchao').level <= logging.WARNING"
)

# Processes that have not imported transformers yet; forked, so that what it imports of others is imported once for all.
EACH_ITS_OWN = """
import os, sys, torch, numpy, tokenizers, huggingface_hub
import torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor, torch.export, accelerate, datasets
from importlib.util import find_spec
for name in ("scipy.optimize", "torchao.quantization"):
    if find_spec(name.partition(".")[0]) is not None:
        __import__(name)
assert not {"transformers", "distillkit"} & set(sys.modules)
for imports in sys.argv[1:]:
    if (child := os.fork()) == 0:
        exec(imports)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(imports)
"""


def test_students_are_known_in_any_order_of_imports():
    """And the package alone silences no other, as its command does."""
    orders = [
        "import distillkit; from transformers import AutoConfig",
        "import distillkit; from transformers import PreTrainedModel",
        "import distillkit; from transformers import GenerationMixin",
        "import distillkit; import distillkit.training",
        "from transformers import AutoModelForCausalLM; import distillkit",
        "import transformers, distillkit",
    ]
    processes = [imports + KNOWN for imports in orders]
    processes[-1] += SILENCES_NOTHING
    subprocess.run([sys.executable, "-c", EACH_ITS_OWN, *processes], check=True)


def test_importing_the_package_alone_imports_no_torch():
    subprocess.run([sys.executable, "-c", "import distillkit, sys; assert 'torch' not in sys.modules"], check=True)
